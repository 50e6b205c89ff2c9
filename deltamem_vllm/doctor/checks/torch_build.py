# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""torch fits vLLM, and torch's sister packages fit torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.versions import INSTALL, build, carrier
from deltamem_vllm.doctor.findings import Finding

NAME = "torch"
SISTERS = ("torchvision", "torchaudio", "torchcodec")
# What a library that was built for CUDA asks the linker for.
_CUDA_LIBRARIES = (b"libcudart.so", b"libc10_cuda.so", b"libtorch_cuda.so")


def check_torch(asked: Asked) -> Iterator[Finding]:
    """torch's version and build against those that vLLM was built with."""
    if importlib.util.find_spec("torch") is None:
        yield Finding(NAME, "error", "torch is not installed", f"it comes with vLLM: {INSTALL}")
        return
    told = asked.torch_facts.get("torch")
    version, vllm_build = told["version"], build()
    kind = "CPU" if told["cuda"] is None else f"CUDA {told['cuda']}"
    wanted = _wanted()
    if wanted is not None and not wanted.specifier.contains(Version(version).public):
        yield Finding(
            NAME,
            "error",
            f"torch {version}, but the installed vLLM was built with torch{wanted.specifier}",
            f"pip install 'torch{wanted.specifier}' of the same kind of build",
        )
    if vllm_build == "cuda" and told["cuda"] is None:
        yield Finding(
            NAME,
            "error",
            f"torch {version} is a CPU build, vLLM is a CUDA build",
            "install torch's CUDA build, or on a machine without a GPU vLLM's CPU build",
        )
    if vllm_build == "cpu" and told["cuda"] is not None:
        yield Finding(
            NAME,
            "note",
            f"torch {version} is a CUDA build and vLLM a CPU build: gigabytes that nothing uses",
            "torch's CPU wheels are on an index of their own, which PyTorch's installation page names",
        )
    yield Finding(NAME, "ok", f"torch {version}, {kind} build")


def check_sisters(asked: Asked) -> Iterator[Finding]:
    """No CUDA builds of torchvision and the like beside a CPU build of torch: importing them fails."""
    cpu_only = asked.torch_facts.get("torch")["cuda"] is None
    for name in SISTERS:
        try:
            one = distribution(name)
        except PackageNotFoundError:
            continue
        cuda = _cuda_library(one)
        if cpu_only and cuda is not None:
            yield Finding(
                name,
                "warning",
                f"{name} {one.version} is a CUDA build ({cuda}) and torch a CPU build: importing it fails, and with it "
                "what looks for it, such as transformers",
                f"pip uninstall {name}; text models do not need it",
            )
        else:
            yield Finding(name, "ok", f"{name} {one.version}")


def _wanted() -> Requirement | None:
    """What vLLM's metadata says of torch for this machine, without the name of the build."""
    vllm = carrier()
    for line in (vllm.requires or []) if vllm is not None else []:
        requirement = Requirement(line)
        if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            # +cpu or +cu130 is the build, which is judged on its own.
            return Requirement("torch" + str(requirement.specifier).partition("+")[0])
    return None


def _cuda_library(one: Distribution) -> str | None:
    """The first shared library of a package that needs CUDA, by name; None if there is none."""
    for file in one.files or []:
        path = Path(str(one.locate_file(file)))
        if ".so" in path.suffixes and path.is_file():
            content = path.read_bytes()
            if any(name in content for name in _CUDA_LIBRARIES):
                return path.name
    return None
