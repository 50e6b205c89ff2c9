# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A top-level package `triton_kernels` is what vLLM calls for mixtures of experts: it must be the real one.

deltamem has a folder of that name in its repository. It is installed as `deltamem_vllm.triton_kernels`, but a path
with the repository's root on it makes vLLM find it by its bare name.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding

NAME = "triton_kernels"
# The parts that vLLM imports; which of the two first ones depends on its version.
_MATMUL = ("matmul_ogs.py", "matmul.py")
_NEEDED = ("tensor.py", "routing.py", "topk.py")


def check_triton_kernels(asked: Asked) -> Iterator[Finding]:
    """What ``import triton_kernels`` would find."""
    del asked
    spec = importlib.util.find_spec(NAME)
    if spec is None:
        yield Finding(NAME, "ok", "no top-level package of that name")
        return
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any(_is_real(folder) for folder in folders):
        yield Finding(NAME, "ok", f"the Triton project's package in {folders[0]}")
        return
    place = folders[0] if folders else Path(spec.origin or "?")
    whose = "deltamem's own folder" if (place / "decode_page.py").is_file() else "not the Triton project's package"
    yield Finding(
        NAME,
        "error",
        f"`import triton_kernels` finds {place}, which is {whose}; vLLM would call into it",
        f"take {place.parent} off PYTHONPATH and do not start with `python -m` from there; or remove {place}",
    )


def _is_real(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _MATMUL) and any((folder / name).is_file() for name in _NEEDED)
