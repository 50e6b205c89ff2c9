# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Triton kernels with broken tables, in a pool between two forbidden pages of memory: reading outside ends the process.

`python triton_fuzz.py` prints how many calls survived; `python triton_fuzz.py control` tells a kernel that the pool is
larger than it is, which must not survive.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import triton_interpreter  # noqa: F401 - first: it makes Triton interpret

# isort: split
import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.triton_kernels import attention, cold_pages, gather, utility

DIM, BLOCK, PAGES, SEQUENCES, WIDTH = 64, 32, 5, 3, 2
LIBC = ctypes.CDLL(None, use_errno=True)
PROT_NONE = 0


def guarded(size: int) -> Tensor:
    """`size` bytes, a whole number of memory pages, with an unreadable page before and after."""
    assert size % mmap.PAGESIZE == 0
    region = mmap.mmap(-1, size + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (start, start + mmap.PAGESIZE + size):
        if LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(region, dtype=torch.uint8, count=size, offset=mmap.PAGESIZE)


def wild(generator: torch.Generator, *shape: int) -> Tensor:
    """Numbers of pages or counts: small, negative, just too large and far too large."""
    kinds = torch.tensor([0, 1, 2, PAGES - 1, PAGES, -1, BLOCK * WIDTH, 2**31 - 1, -(2**31), 123456789])
    return kinds[torch.randint(len(kinds), shape, generator=generator)].int()


def main(control: bool) -> None:
    layout, raw = make_layout("slot_major", BLOCK, DIM), guarded(PAGES * BLOCK * 2 * DIM * 2)
    pool = raw.view(torch.bfloat16).view(PAGES, -1)
    survived = 0
    if control:
        attend = attention.attend_pages

        class Larger:
            def __getitem__(self, grid):
                # The argument after the scale is the number of pages.
                return lambda *given, **named: attend[grid](*given[:11], PAGES + 1, *given[12:], **named)

        attention.attend_pages = Larger()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        raw.copy_(torch.randint(256, raw.shape, generator=generator, dtype=torch.uint8))
        cold = ColdFormat((8, 4, 2)[seed % 3], DIM, raw.numel() // PAGES)
        heads = raw.view(PAGES, -1)[:, :4].view(torch.int32)
        heads.copy_(wild(generator, PAGES, 1))
        queries = torch.randn(4, 2, DIM, generator=generator).bfloat16()
        starts = torch.tensor([0, 1, 2, 4] if seed % 2 else [0, 2, 1, 9], dtype=torch.int32)
        table, lengths = wild(generator, SEQUENCES, WIDTH), wild(generator, SEQUENCES)
        if control:
            table[:], lengths[:] = PAGES, BLOCK
        attention.paged_attention(
            queries, pool, layout, table, lengths, starts, 0.125, torch.zeros_like(queries),
            cold_format=cold, cold_table=wild(generator, SEQUENCES, 3), cold_pages=wild(generator, SEQUENCES),
            max_query_len=4, splits=1 + seed % 2,
        )  # fmt: skip
        window = torch.randn(SEQUENCES, 2, 2, DIM, generator=generator).bfloat16()
        utility.page_utility(window, pool, layout, table, lengths, 0.125, splits=1 + seed % 2)
        cold_pages.decode_delta(cold, raw.view(PAGES, -1), wild(generator, 4), torch.float32)
        tokens = torch.randn(2, cold.capacity, DIM, generator=generator)
        cold_pages.encode_delta(cold, tokens, tokens, wild(generator, 2), raw.view(PAGES, -1), wild(generator, 2))
        gather.gather_pages(pool, layout, wild(generator, BLOCK), wild(generator, BLOCK), wild(generator, 1))
        survived += 1
    print(survived)


if __name__ == "__main__":
    main(sys.argv[1:] == ["control"])
