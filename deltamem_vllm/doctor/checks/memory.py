# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Main memory for the KV cache of a CPU server, and shared memory for vLLM's processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.versions import build
from deltamem_vllm.doctor.findings import Finding

NAME = "memory"
VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
_GIB = 2**30
_LEAST_SHARED = _GIB  # Docker gives 64 MiB unless told otherwise, and vLLM's processes send tensors through it
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(asked: Asked) -> Iterator[Finding]:
    """The KV cache that a CPU server would take, against what there is."""
    total, free = _main_memory()
    there = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free"
    if build() != "cpu":
        yield Finding(NAME, "ok", there)
        return
    given = asked.environment.get(VARIABLE)
    smaller = f"set {VARIABLE} to a smaller whole number of GiB"
    if given is None:
        yield Finding(
            NAME,
            "note",
            f"{there}; {VARIABLE} is not set, so a CPU server takes most of what is free",
            f"{VARIABLE}=4 takes 4 GiB for the KV cache",
        )
    elif not given.strip().isdigit():
        yield Finding(
            NAME, "error", f"{VARIABLE}={given!r} is no whole number of GiB: vLLM does not start", f"{VARIABLE}=4"
        )
    elif int(given) * _GIB > total:
        yield Finding(NAME, "error", f"{VARIABLE}={given} GiB is more than this machine has; {there}", smaller)
    elif int(given) * _GIB > free:
        yield Finding(NAME, "warning", f"{VARIABLE}={given} GiB does not fit now; {there}", f"{smaller}, or end others")
    else:
        yield Finding(NAME, "ok", f"{VARIABLE}={given} GiB; {there}")


def check_shared_memory(asked: Asked, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Room in /dev/shm."""
    del asked
    name = str(folder)
    if not folder.is_dir():
        yield Finding(name, "error", "is not there: vLLM's processes talk through it", "mount a tmpfs there")
        return
    usage = shutil.disk_usage(folder)
    sizes = f"{usage.free / _GIB:.2f} of {usage.total / _GIB:.2f} GiB are free"
    if usage.free < _LEAST_SHARED:
        yield Finding(
            name,
            "warning",
            f"{sizes}: too little for tensor parallelism and large requests",
            "in Docker: --shm-size 8g or --ipc host; in Kubernetes: an emptyDir with medium Memory",
        )
    else:
        yield Finding(name, "ok", sizes)


def _main_memory() -> tuple[int, int]:
    """Total and available bytes, within the container's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    numbers = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total, free = numbers["MemTotal"], numbers["MemAvailable"]
    for place in map(Path, _CGROUP_LIMITS):
        if place.is_file() and (text := place.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total, min(total, free)
