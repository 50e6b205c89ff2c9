# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Random steps of attention over hot and cold pages, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import encode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.ops.layout import PageLayout

NOT_A_PAGE = 2**30
"""Stands in every entry of a page table that must not be read."""


@dataclass(frozen=True)
class AttentionCase:
    """One call. Pages of the sequences are spread over the whole pool; what nobody owns, free slots included, is NaN.

    Attributes
    ----------
    query: ``[T, G, D]``.
    pool: ``[NP, block_size * 2 * D]``.
    hot: layout of hot pages.
    block_table, seq_lens, query_start_loc: int32 ``[S, W]``, ``[S]`` and ``[S + 1]``.
    scale: factor on q.k.
    cold_format, cold_table, cold_pages: format, int32 ``[S, Wc]`` and ``[S]``; all None without cold pages.
    """

    query: Tensor
    pool: Tensor
    hot: PageLayout
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    scale: float
    cold_format: ColdFormat | None
    cold_table: Tensor | None
    cold_pages: Tensor | None

    @property
    def cold(self) -> dict[str, Any]:
        """The keyword arguments about cold pages."""
        return {"cold_format": self.cold_format, "cold_table": self.cold_table, "cold_pages": self.cold_pages}

    @property
    def bytes_read(self) -> int:
        """Bytes of tokens that decoding this case must read once: of hot tokens, and of whole cold pages."""
        token = 2 * self.hot.head_size * self.pool.element_size()
        cold = 0 if self.cold_pages is None else int(self.cold_pages.sum())
        return int(self.seq_lens.sum()) * token + cold * self.pool.shape[1] * self.pool.element_size()

    def with_pool(self, pool: Tensor) -> AttentionCase:
        """The same call on another pool of the same shape."""
        return replace(self, pool=pool)


def make_attention(
    layout: str,
    dtype: torch.dtype,
    dim: int,
    block_size: int,
    group: int,
    queries: Sequence[int],
    hot: Sequence[int],
    bits: int = 0,
    cold: Sequence[int] = (),
    *,
    full: bool = False,
    seed: int = 0,
) -> AttentionCase:
    """A step of sequences with so many queries, hot tokens and cold pages.

    Parameters
    ----------
    layout: one of `inputs.LAYOUTS`.
    dtype: of pool and queries.
    dim, block_size: D and slots of a hot page.
    group: query heads of a kv head.
    queries, hot: of every sequence; a sequence's queries are its last hot tokens.
    bits: of cold tokens; 0: no cold pages.
    cold: cold pages of every sequence.
    full: every cold page holds as many tokens as it can, instead of 1 to that many.
    """
    generator = torch.Generator().manual_seed(seed)
    paged = make_layout(layout, block_size, dim)
    pages = [-(-tokens // block_size) for tokens in hot]
    extra = sum(cold) if bits else 0
    order = torch.randperm(sum(pages) + extra + 3, generator=generator).to(torch.int32)
    pool = torch.full((len(order), block_size * 2 * dim), float("nan"), dtype=dtype)
    # Some dims of keys are large, as they are in models: what codes per channel are for.
    size = torch.where(torch.rand(dim, generator=generator) < 0.1, 4.0, 1.0)

    table = torch.full((len(hot), max([1, *pages])), NOT_A_PAGE, dtype=torch.int32)
    used = 0
    for s, (count, tokens) in enumerate(zip(pages, hot, strict=True)):
        table[s, :count] = own = order[used : used + count]
        used += count
        for offsets, factor in ((paged.keys, size), (paged.values, torch.ones(dim))):
            content = torch.randn(count, block_size, dim, generator=generator) * factor
            content.view(-1, dim)[tokens:] = float("nan")
            pool[own.long().unsqueeze(1), offsets.reshape(1, -1)] = content.view(count, block_size * dim).to(dtype)

    cold_format = cold_table = cold_pages = None
    if bits:
        cold_format = ColdFormat(bits, dim, block_size * 2 * dim * pool.element_size())
        cold_pages = torch.tensor(cold, dtype=torch.int32)
        cold_table = torch.full((len(hot), max([1, *cold])), NOT_A_PAGE, dtype=torch.int32)
        capacity = cold_format.capacity
        raw = pool.view(torch.uint8)
        for s, count in enumerate(cold):
            if not count:
                continue
            cold_table[s, :count] = own = order[used : used + count]
            used += count
            counts = torch.randint(1, capacity + 1, (count,), generator=generator)
            counts = torch.full_like(counts, capacity) if full else counts
            keys = torch.randn(count, capacity, dim, generator=generator) * size
            values = torch.randn(count, capacity, dim, generator=generator)
            raw[own.long()] = encode_pages(cold_format, keys, values, counts)

    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    query = torch.randn(int(starts[-1]), group, dim, generator=generator).to(dtype)
    lengths = torch.tensor(hot, dtype=torch.int32)
    return AttentionCase(query, pool, paged, table, lengths, starts, dim**-0.5, cold_format, cold_table, cold_pages)


def draw_attention(
    layout: str, dtype: torch.dtype, dim: int, block_size: int, group: int, bits: int, seed: int
) -> AttentionCase:
    """A mixed step: padding, decoding and prefill chunks, ragged lengths, none to three cold pages each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most + 1, (), generator=generator))

    sequences = 1 + draw(4)
    queries = [(0, 1, 1, 2 + draw(40))[draw(3)] for _ in range(sequences)]
    hot = [count + (0, draw(20), draw(300))[draw(2)] for count in queries]
    return make_attention(
        layout, dtype, dim, block_size, group, queries, hot, bits, [draw(3) for _ in queries], seed=seed
    )
