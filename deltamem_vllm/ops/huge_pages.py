# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Huge pages for the KV pool of a CPU.

Attention over a pool of gigabytes takes a few KiB here and a few KiB there: with pages of 4 KiB the processor looks up
an address for each of them, with pages of 2 MiB it nearly always knows it. Most Linux distributions give huge pages
only to memory for which they are asked (``madvise`` in /sys/kernel/mm/transparent_hugepage/enabled), and vLLM does not
ask.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

HUGE = 2 * 2**20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Linux, asm-generic/mman-common.h
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14


def huge_pages_setting(path: Path = SETTING) -> str:
    """What the kernel does: ``always``, ``madvise`` or ``never``; ``never`` where it has no huge pages."""
    if not path.is_file():
        return "never"
    _, _, rest = path.read_text().partition("[")
    return rest.partition("]")[0]


def prefer_huge_pages(memory: Tensor) -> int:
    """Ask for huge pages behind some memory.

    If it holds nothing but zeros, these are given back to the kernel and come again as huge pages; small pages that
    hold something are left to the kernel, which may take hours to join them. Nothing changes for who reads the memory.

    Parameters
    ----------
    memory: contiguous, on the CPU.

    Returns
    -------
    int
        Bytes that came as huge pages, as far as the kernel has free ones; 0 where it has none to give, or the memory
        holds something.

    Raises
    ------
    ValueError: it is no plain memory of a CPU.
    """
    # Here, so that `deltamem doctor` reads the setting without torch.
    import torch

    if not memory.is_cpu or not memory.is_contiguous():
        raise ValueError(f"memory must be contiguous and on the CPU, got {memory.device}, strides {memory.stride()}")
    size = memory.numel() * memory.element_size()
    first = -(-memory.data_ptr() // HUGE) * HUGE
    length = (memory.data_ptr() + size - first) // HUGE * HUGE
    if length <= 0 or huge_pages_setting() == "never":
        return 0
    plain = memory.view(-1).view(torch.uint8)  # as bytes: -0.0 is something, too
    # Where one fails nothing has changed: locked memory, say, keeps its pages.
    if not _advise(first, length, _MADV_HUGEPAGE) or bool(plain.any()) or not _advise(first, length, _MADV_DONTNEED):
        return 0
    # Now, and not in the first requests: a machine that has too little memory should say so when it starts.
    begin = first - memory.data_ptr()
    plain[begin : begin + length : 4096] = 0
    return length


def _advise(first: int, length: int, advice: int) -> bool:
    failed: int = ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), ctypes.c_int(advice))
    return not failed
