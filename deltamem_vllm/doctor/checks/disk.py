# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Caches on disk can be written and have room."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding

NAME = "disk"
_GIB = 2**30
_LEAST = 2 * _GIB  # compiled graphs and a small model


def check_disk(asked: Asked) -> Iterator[Finding]:
    """Room for deltamem's, vLLM's and Hugging Face's caches and for temporary files."""
    for what, folder in _folders(asked.environment).items():
        there = _nearest(folder)
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            yield Finding(
                NAME, "error", f"{what} {folder} cannot be written: {error.strerror}", _elsewhere(what, folder)
            )
            continue
        free = shutil.disk_usage(there).free
        room = f"{what} {folder}: {free / _GIB:.1f} GiB free"
        if free < _LEAST:
            yield Finding(NAME, "warning", f"{room}: little for models and graphs", _elsewhere(what, folder))
        else:
            yield Finding(NAME, "ok", room)


_VARIABLES = {
    "deltamem's cache": "DELTAMEM_CACHE",
    "vLLM's cache": "VLLM_CACHE_ROOT",
    "Hugging Face's cache": "HF_HOME",
    "temporary files": "TMPDIR",
}


def _folders(environment: Mapping[str, str]) -> dict[str, Path]:
    caches = Path(environment.get("XDG_CACHE_HOME") or "~/.cache")
    usual = (Path("~/.cache/deltamem"), caches / "vllm", caches / "huggingface", Path(tempfile.gettempdir()))
    return {
        what: Path(environment.get(variable) or default).expanduser()
        for (what, variable), default in zip(_VARIABLES.items(), usual, strict=True)
    }


def _nearest(folder: Path) -> Path:
    """The folder itself, or where it would be made."""
    return next(place for place in (folder, *folder.parents) if place.is_dir() or place == Path(place.anchor))


def _elsewhere(what: str, folder: Path) -> str:
    return f"make room or change its rights ({folder}), or set {_VARIABLES[what]} to another folder"
