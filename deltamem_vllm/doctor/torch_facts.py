# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The doctor's child that imports torch and loads the native library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from deltamem_vllm.doctor.children import tell


def steps(request: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """The facts, in the order in which they are found out: what may crash comes last."""
    return {
        "torch": _torch,
        "scorers": _scorers,
        "calibration": partial(_calibration, request["model"]),
        "native": _native,
        "openmp": _openmp,
        "self_test": _self_test,
    }


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "sees_gpu": torch.cuda.is_available(),
    }


def _scorers() -> dict[str, str | None]:
    """Name of each scorer, and where it comes from -> what is wrong with it."""
    from deltamem_vllm.scoring.registry import describe_scorers

    return {
        info.name if info.error is None else f"{info.name} ({info.path})": info.error for info in describe_scorers()
    }


def _calibration(model: str | None) -> dict[str, Any] | None:
    """Where the model's calibration is, as a server with the defaults would find it; None without a model."""
    if model is None:
        return None
    from deltamem_vllm.calibration.artifact import cached_place, find
    from deltamem_vllm.calibration.errors import CalibrationError
    from deltamem_vllm.calibration.fingerprint import fingerprint, model_folder
    from deltamem_vllm.doctor.models import local_name

    name = local_name(model)
    folder = model_folder(name)
    if folder is None:
        return {"model_is_here": False}
    told: dict[str, Any] = {"model_is_here": True, "folder": None, "predictor": False, "fault": None}
    try:
        told["fingerprint"] = fingerprint(folder)
    except CalibrationError as error:
        return {**told, "fingerprint": None, "why": str(error)}
    told["place"] = str(cached_place(told["fingerprint"]))
    try:
        found = find("auto", name)
    except CalibrationError as error:
        return {**told, "fault": str(error)}
    if found is not None:
        told |= {"folder": str(found.folder), "predictor": found.predictor is not None}
    return told


def _native() -> dict[str, Any]:
    from deltamem_vllm.ops import native

    there = native._path().is_file()
    told: dict[str, Any] = {"path": str(native._path()), "there": there}
    if there:
        library = native.library()
        assert library is not None, "its file is there"
        told |= {"abi": library.deltamem_abi(), "isa": native.isa(), "supported": native.supported_isas()}
    return told


def _openmp() -> list[str]:
    import torch

    from deltamem_vllm.ops import native

    # A runtime is loaded when torch first splits work.
    torch.ones(1 << 16).sum()
    return native.openmp_runtimes()


def _self_test() -> dict[str, str]:
    from deltamem_vllm.doctor.self_test import run

    return run()


if __name__ == "__main__":
    tell(steps)
