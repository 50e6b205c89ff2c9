# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The folder in which several API servers keep their metrics."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding

NAME = "Prometheus folder"
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_UNSET = f"unset {VARIABLE}: vLLM then makes a folder of its own where it needs one and removes it"
_PROCESS = re.compile(r"_(\d+)\.db$")


def check_prometheus(asked: Asked) -> Iterator[Finding]:
    """Unset is best; else it exists, can be written, and holds nothing of servers that are gone."""
    named = asked.environment.get(VARIABLE)
    if named is None:
        yield Finding(NAME, "ok", f"{VARIABLE} is not set; vLLM makes one where it needs one")
        return
    folder = Path(named)
    if not folder.is_dir():
        yield Finding(NAME, "error", f"{VARIABLE}={named} is no folder: servers cannot start", f"make it, or {_UNSET}")
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield Finding(NAME, "error", f"{VARIABLE}={named} cannot be written: {error.strerror}", _UNSET)
        return
    files = {file: int(found[1]) for file in folder.glob("*.db") if (found := _PROCESS.search(file.name))}
    gone = [file for file, process in files.items() if not Path(f"/proc/{process}").exists()]
    if gone:
        yield Finding(
            NAME,
            "warning",
            f"{VARIABLE}={named} holds {len(gone)} files of processes that are gone: a new server adds their numbers",
            f"empty it before every start (rm {named}/*.db), or {_UNSET}",
        )
    elif files:
        yield Finding(NAME, "note", f"{VARIABLE}={named} is in use by a running server; give each server its own")
    else:
        yield Finding(NAME, "ok", f"{VARIABLE}={named} is empty and can be written")
