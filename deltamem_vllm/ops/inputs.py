# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Random paged caches: one generator for tests and benchmarks of every operation on pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import PageLayout

LAYOUTS = ("slot_major", "keys_transposed", "tiled")
"""Orders inside a page: FlashAttention's, the CPU kernel's, and a non-affine one like that of AMX tiles."""


@dataclass(frozen=True)
class PagedTokens:
    """A cache of one layer and one request's place in it.

    Attributes
    ----------
    cache: ``[num_blocks, H, block_size, 2 * D]``; blocks that belong to nobody hold NaN.
    layout: of the pages.
    source: block ids of the request, in token order.
    spare: as many distinct block ids that belong to nobody.
    tokens: the request's resident tokens.
    survivors: ``[H, keep]`` ascending resident indices.
    """

    cache: Tensor
    layout: PageLayout
    source: list[int]
    spare: list[int]
    tokens: int
    survivors: Tensor


def make_layout(name: str, block_size: int, dim: int) -> PageLayout:
    """One of ``LAYOUTS`` for pages of ``block_size`` slots and heads of ``dim`` elements."""
    slot = torch.arange(block_size).view(-1, 1)
    d = torch.arange(dim).view(1, -1)
    if name == "slot_major":  # [slot, 2 * D]: key and value side by side
        return PageLayout(slot * 2 * dim + d, slot * 2 * dim + dim + d)
    if name == "keys_transposed":  # K as [D, slot], V as [slot, D]
        return PageLayout(d * block_size + slot, block_size * dim + slot * dim + d)
    if name == "tiled":  # K in pairs of dims, [D / 2, slot, 2]: not affine in d
        return PageLayout((d // 2) * 2 * block_size + slot * 2 + d % 2, block_size * dim + slot * dim + d)
    raise ValueError(f"unknown page layout {name!r}; available: {', '.join(LAYOUTS)}")


def make_paged_tokens(
    layout: str, heads: int, dim: int, block_size: int, tokens: int, keep: int, dtype: torch.dtype, seed: int
) -> PagedTokens:
    """A request of ``tokens`` random tokens in random blocks, and ``keep`` random survivors per head."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block_size)
    order = torch.randperm(2 * blocks + 1, generator=generator).tolist()
    source, spare = order[:blocks], order[blocks : 2 * blocks]
    cache = torch.full((len(order), heads, block_size, 2 * dim), float("nan"), dtype=dtype)
    cache[source] = torch.randn(blocks, heads, block_size, 2 * dim, generator=generator).to(dtype)
    survivors = torch.stack([torch.randperm(tokens, generator=generator)[:keep].sort().values for _ in range(heads)])
    return PagedTokens(cache, make_layout(layout, block_size, dim), source, spare, tokens, survivors)
