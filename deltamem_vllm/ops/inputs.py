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
class DealtTokens:
    """A whole pool and one request whose pages are spread over all of it, unequally over its pairs (layer, head).

    Attributes
    ----------
    pool: ``[NP, block_size * 2 * D]``; pages that belong to nobody hold NaN.
    layout: of the pages.
    pages: page ids of pair ``layer * H + head`` in resident order.
    lengths: resident tokens of each pair; only its last page may have free slots, which hold NaN.
    kept: ascending resident indices that each pair keeps, a multiple of block_size; together a quarter of the whole
        pages, or one page if that is more.
    spare: as many distinct pages that belong to nobody as ``kept`` fills.
    """

    pool: Tensor
    layout: PageLayout
    pages: list[list[int]]
    lengths: list[int]
    kept: list[Tensor]
    spare: list[int]

    def targets(self, ids: list[int]) -> list[list[int]]:
        """Deal page ids out to the pairs, as many as each needs for what it keeps."""
        parts, start = [], 0
        for kept in self.kept:
            count = len(kept) // self.layout.block_size
            parts.append(ids[start : start + count])
            start += count
        return parts


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


def make_dealt_tokens(
    layout: str, pairs: int, dim: int, block_size: int, pages: int, tail: int, dtype: torch.dtype, seed: int
) -> DealtTokens:
    """``pairs`` pairs with ``pages`` whole pages on average, at least one each, and ``tail`` tokens more."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    whole = [1] * pairs
    rich = [draw(pairs) for _ in range(max(1, pairs // 3))]  # Few pairs hold most pages, as in real dealing.
    for _ in range(pairs * (pages - 1)):
        whole[rich[draw(len(rich))] if draw(4) else draw(pairs)] += 1
    lengths = [n * block_size + tail for n in whole]
    keep = [0] * pairs
    for pair in (
        torch.arange(pairs)
        .repeat_interleave(torch.tensor(whole))[
            torch.randperm(sum(whole), generator=generator)[: max(1, sum(whole) // 4)]
        ]
        .tolist()
    ):
        keep[pair] += 1
    held = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(held) + sum(keep) + pairs, generator=generator).tolist()
    ids = [order[sum(held[:i]) : sum(held[: i + 1])] for i in range(pairs)]
    paged = make_layout(layout, block_size, dim)
    pool = torch.full((len(order), block_size * 2 * dim), float("nan"), dtype=dtype)
    pool[order[: sum(held)]] = torch.randn(sum(held), block_size * 2 * dim, generator=generator).to(dtype)
    if tail % block_size:
        free = torch.cat([paged.keys[tail % block_size :].flatten(), paged.values[tail % block_size :].flatten()])
        pool[torch.tensor([own[-1] for own in ids]).unsqueeze(1), free] = float("nan")
    kept = [
        torch.randperm(length, generator=generator)[: n * block_size].sort().values
        for length, n in zip(lengths, keep, strict=True)
    ]
    return DealtTokens(pool, paged, ids, lengths, kept, order[sum(held) : sum(held) + sum(keep)])


def between_codes(pages: int, capacity: int, bits: int, generator: torch.Generator) -> Tensor:
    """Elements half-way between two codes of a cold page or next to it, where the last bit of a division decides.

    Returns
    -------
    ``[pages, capacity]`` float32, each row with a range that is a whole number of steps; in dtypes that cannot tell
    them apart neighbours fall together.
    """
    largest = 2**bits - 1
    step = torch.rand(pages, 1, generator=generator).add(0.01).half().float()
    middle = (torch.randint(0, largest, (pages, capacity), generator=generator) + 0.5) * step
    beside = torch.tensor((-torch.inf, torch.inf, 0.0))[torch.randint(0, 3, middle.shape, generator=generator)]
    elements = torch.where(beside == 0.0, middle, torch.nextafter(middle, beside))
    elements[:, 0], elements[:, 1] = 0.0, largest * step[:, 0]  # they make the range, and it the step
    return elements
