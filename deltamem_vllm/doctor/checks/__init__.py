# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The checks, in the order in which their findings are shown. One subject a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.calibration import check_calibration
from deltamem_vllm.doctor.checks.compiler import check_compiler
from deltamem_vllm.doctor.checks.disk import check_disk
from deltamem_vllm.doctor.checks.gpu import check_gpu
from deltamem_vllm.doctor.checks.ledger import check_ledger
from deltamem_vllm.doctor.checks.memory import check_memory, check_shared_memory
from deltamem_vllm.doctor.checks.model import check_model
from deltamem_vllm.doctor.checks.native import check_native, check_openmp
from deltamem_vllm.doctor.checks.plugins import check_plugins, check_scorers
from deltamem_vllm.doctor.checks.ports import check_ports
from deltamem_vllm.doctor.checks.prometheus import check_prometheus
from deltamem_vllm.doctor.checks.server import check_server
from deltamem_vllm.doctor.checks.threads import check_huge_pages, check_preloads, check_threads
from deltamem_vllm.doctor.checks.torch_build import check_sisters, check_torch
from deltamem_vllm.doctor.checks.triton_kernels import check_triton_kernels
from deltamem_vllm.doctor.checks.versions import check_deltamem, check_vllm
from deltamem_vllm.doctor.findings import Finding

Check = Callable[[Asked], Iterable[Finding]]

CHECKS: tuple[Check, ...] = (
    check_deltamem,
    check_vllm,
    check_plugins,
    check_ledger,
    check_scorers,
    check_torch,
    check_sisters,
    check_triton_kernels,
    check_native,
    check_openmp,
    check_gpu,
    check_compiler,
    check_model,
    check_calibration,
    check_ports,
    check_prometheus,
    check_memory,
    check_shared_memory,
    check_threads,
    check_preloads,
    check_huge_pages,
    check_disk,
    check_server,
)
