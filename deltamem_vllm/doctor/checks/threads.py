# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Threads, preloaded libraries and huge pages of a CPU server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.versions import build, carrier
from deltamem_vllm.doctor.findings import Finding
from deltamem_vllm.ops.huge_pages import SETTING, huge_pages_setting

NAME = "threads"
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_WORDS = ("auto", "nobind")


def check_threads(asked: Asked) -> Iterator[Finding]:
    """How many threads a CPU server runs, and where."""
    cores = os.sched_getaffinity(0)
    given, bound = asked.environment.get("OMP_NUM_THREADS"), asked.environment.get(_BIND, "auto")
    if given is not None and (not given.isdigit() or int(given) < 1):
        yield Finding(NAME, "error", f"OMP_NUM_THREADS={given!r} is no number of threads", "unset it")
    elif given is not None and int(given) > len(cores):
        yield Finding(
            NAME,
            "warning",
            f"OMP_NUM_THREADS={given}, but this process may use {len(cores)} cores: threads wait for each other",
            f"unset it, or OMP_NUM_THREADS={len(cores)}",
        )
    if bound not in _WORDS:
        try:
            outside = sorted(_cores_of(bound) - cores)
        except ValueError:
            yield Finding(NAME, "error", f"{_BIND}={bound!r} names no cores", f"{_BIND}=auto, or such as 0-3|4-7")
            return
        if outside:
            yield Finding(
                NAME,
                "error",
                f"{_BIND}={bound} names cores that this process may not use: {', '.join(map(str, outside))}",
                f"{_BIND}=auto, or name some of {', '.join(map(str, sorted(cores)))}",
            )
    yield Finding(NAME, "ok", f"{len(cores)} cores, OMP_NUM_THREADS {given or 'not set'}, {_BIND} {bound}")


def check_preloads(asked: Asked) -> Iterator[Finding]:
    """What LD_PRELOAD names exists, and a CPU server has tcmalloc."""
    preloaded = [word for word in asked.environment.get("LD_PRELOAD", "").replace(" ", ":").split(":") if word]
    for missing in [word for word in preloaded if "/" in word and not Path(word).exists()]:
        yield Finding("preloads", "warning", f"LD_PRELOAD names {missing}, which is not there", "correct LD_PRELOAD")
    if build() != "cpu":
        return
    vllm = carrier()
    bundled = vllm is not None and any("libtcmalloc" in file.name for file in vllm.files or [])
    if bundled or any("tcmalloc" in word for word in preloaded):
        yield Finding("preloads", "ok", f"tcmalloc {'comes with vLLM' if bundled else 'is preloaded'}")
    else:
        yield Finding(
            "preloads",
            "note",
            "tcmalloc is not preloaded: vLLM's CPU server is faster with it",
            "Debian and Ubuntu: apt-get install libtcmalloc-minimal4, and LD_PRELOAD its .so",
        )


def check_huge_pages(asked: Asked) -> Iterator[Finding]:
    """A CPU server's KV pool may lie in huge pages."""
    if build() != "cpu":
        return
    setting = huge_pages_setting()
    if setting == "never":
        yield Finding(
            "huge pages",
            "note",
            "the kernel gives no transparent huge pages: attention over a pool of gigabytes is slower",
            f"echo madvise > {SETTING}, as root of the host",
        )
    else:
        yield Finding("huge pages", "ok", f"transparent huge pages: {setting}")


def _cores_of(text: str) -> set[int]:
    """The cores of ``0-3,8|4-7``."""
    cores: set[int] = set()
    for part in text.replace("|", ",").split(","):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores
