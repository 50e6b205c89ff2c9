# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""GPUs, as the driver's own tool tells them, and what is needed to use them."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
from collections.abc import Iterator

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.versions import build
from deltamem_vllm.doctor.findings import Finding

NAME = "GPU"
_FIELDS = ("name", "memory.total", "memory.used", "compute_cap", "driver_version")
_BUSY = 0.1  # vLLM takes 0.92 of a card unless told otherwise
_LEAST_CAPABILITY = 8.0  # bfloat16, and what deltamem's kernels are compiled for in its tests


def check_gpu(asked: Asked) -> Iterator[Finding]:
    """Name, memory, compute capability, driver; whether torch and Triton can use it."""
    cuda = build() == "cuda"
    tool = shutil.which("nvidia-smi", path=asked.environment.get("PATH"))
    if tool is None:
        if cuda:
            yield Finding(
                NAME,
                "error",
                "vLLM is a CUDA build and there is no nvidia-smi, so no driver",
                "install the NVIDIA driver (in a container: --gpus all), or vLLM's CPU build",
            )
        else:
            yield Finding(NAME, "ok", "none, and none is needed: vLLM is no CUDA build")
        return
    command = [tool, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    asked_for = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    rows = [line.split(", ") for line in asked_for.stdout.splitlines() if line.count(", ") == len(_FIELDS) - 1]
    if asked_for.returncode or not rows:
        said = (asked_for.stdout + asked_for.stderr).strip()[-300:]
        yield Finding(
            NAME,
            "error" if cuda else "note",
            f"nvidia-smi finds no GPU (status {asked_for.returncode}): {said or 'it said nothing'}",
            "reboot or reinstall the driver; in a container: --gpus all",
        )
        return
    for name, total, used, capability, driver in rows:
        yield from _one(name, total, used, capability, driver)
    if not cuda:
        yield Finding(NAME, "note", "a GPU is there and vLLM's build is not for it: it runs on the CPU")
        return
    yield from _usable(asked)


def _one(name: str, total: str, used: str, capability: str, driver: str) -> Iterator[Finding]:
    yield Finding(NAME, "ok", f"{name}, {total} MiB, compute capability {capability}, driver {driver}")
    if _number(capability) < _LEAST_CAPABILITY:
        yield Finding(
            NAME,
            "warning",
            f"{name} has compute capability {capability}; deltamem's kernels are compiled for {_LEAST_CAPABILITY} up",
            "use a newer card, or --deltamem-config.dealing equal --deltamem-config.cold_bits 0, which need no kernel",
        )
    if _number(used) > _BUSY * _number(total):
        yield Finding(
            NAME,
            "warning",
            f"{used} of {total} MiB of {name} are in use",
            "end what uses it (nvidia-smi lists it), or lower --gpu-memory-utilization",
        )


def _number(text: str) -> float:
    """What the tool says; not a number, which is neither more nor less than any, where it says [N/A]."""
    return float(text) if text.replace(".", "", 1).isdigit() else math.nan


def _usable(asked: Asked) -> Iterator[Finding]:
    if not asked.torch_facts.get("torch")["sees_gpu"]:
        visible = asked.environment.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES={visible!r} chooses which it may see"
        yield Finding(
            NAME,
            "error",
            f"torch cannot use the GPU{hidden}",
            "unset CUDA_VISIBLE_DEVICES, or update the driver to one that knows torch's CUDA version",
        )
    if importlib.util.find_spec("triton") is None:
        yield Finding(
            NAME, "error", "Triton is not installed: deltamem's kernels for a GPU need it", "pip install triton"
        )
