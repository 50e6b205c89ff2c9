# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Random tokens for cold pages: one generator for tests and benchmarks of every operation on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.ops.layout import PageLayout

KINDS = ("normal", "outliers", "constant", "zeros", "ties", "tiny", "huge", "infinite", "nan")
"""What numbers look like: `make_cold_tokens`."""


@dataclass(frozen=True)
class ColdTokens:
    """Tokens of some cold pages, dense.

    Attributes
    ----------
    cold: format of the pages.
    keys, values: ``[p, C, D]``; NaN past a page's tokens, which nobody may look at.
    counts: ``[p]`` int64, 1 to C.
    """

    cold: ColdFormat
    keys: Tensor
    values: Tensor
    counts: Tensor


@dataclass(frozen=True)
class PooledTokens:
    """The same tokens in hot pages of a pool.

    Attributes
    ----------
    pool: ``[num_pages, block_size * 2 * D]``; what belongs to nobody is NaN.
    layout: of the hot pages.
    pages, slots: ``[p, C]`` int64, where each token stands; far out of range past a page's tokens.
    spare: ``[p]`` int64, pages that hold no token.
    """

    pool: Tensor
    layout: PageLayout
    pages: Tensor
    slots: Tensor
    spare: Tensor


def make_cold_tokens(
    kind: str, bits: int, dim: int, block_size: int, pages: int, dtype: torch.dtype, seed: int, full: bool = False
) -> ColdTokens:
    """``pages`` pages of random length, or full ones.

    ``normal``: like keys without outliers; ``outliers``: a few channels and tokens a hundred times larger;
    ``constant``: equal numbers where they share a scale; ``zeros``: of either sign, and ones; ``ties``: halfway
    between two codes; ``tiny`` and ``huge``: below and above float16's range (as far as ``dtype`` can); ``infinite``
    and ``nan``: some are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    cold = ColdFormat(bits, dim, block_size * 2 * dim * dtype.itemsize)
    shape = (pages, cold.capacity, dim)
    parts = [_numbers(kind, bits, shape, place, generator) for place in (1, 2)]
    lowest = cold.capacity if full else 1
    counts = torch.randint(lowest, cold.capacity + 1, (pages,), generator=generator)
    absent = (torch.arange(cold.capacity) >= counts.unsqueeze(1)).unsqueeze(2)
    keys, values = (part.to(dtype) for part in parts)
    keys, values = (part.masked_fill_(absent, float("nan")) for part in (keys, values))
    return ColdTokens(cold, keys, values, counts)


def put_in_pool(tokens: ColdTokens, layout: str, block_size: int, seed: int) -> PooledTokens:
    """The tokens in random slots of random pages, some of which stay free, and as many spare pages as needed."""
    generator = torch.Generator().manual_seed(seed)
    count, capacity, dim = tokens.keys.shape
    there = torch.arange(capacity) < tokens.counts.unsqueeze(1)
    total = int(tokens.counts.sum())
    hot = -(-total * 5 // (4 * block_size)) + 1
    order = torch.randperm(hot + count, generator=generator)
    # Ascending places, as survivors have them: tokens of a page follow each other.
    places = torch.randperm(hot * block_size, generator=generator)[:total].sort().values
    page, slot = order[places // block_size], places % block_size
    paged = make_layout(layout, block_size, dim)
    pool = torch.full((hot + count, block_size * 2 * dim), float("nan"), dtype=tokens.keys.dtype)
    pool[page.unsqueeze(1), paged.keys[slot]] = tokens.keys[there]
    pool[page.unsqueeze(1), paged.values[slot]] = tokens.values[there]
    pages, slots = (torch.full((count, capacity), 1 << 40) for _ in range(2))
    pages[there], slots[there] = page, slot
    return PooledTokens(pool, paged, pages, slots, order[hot:])


def make_hostile_pages(cold: ColdFormat, pages: int, seed: int) -> Tensor:
    """Pages of random bytes, ``[p, page_bytes]`` uint8: counts far out of range, scales that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (pages, cold.page_bytes), dtype=torch.uint8, generator=generator)
    counts = torch.tensor([-(2**31), -1, 0, 1, cold.capacity, cold.capacity + 1, 2**31 - 1], dtype=torch.int32)
    chosen = counts[torch.randint(len(counts), (pages,), generator=generator)]
    raw[:, :4] = chosen.unsqueeze(1).view(torch.uint8)
    return raw


def _numbers(kind: str, bits: int, shape: tuple[int, int, int], shared: int, generator: torch.Generator) -> Tensor:
    """Float32 numbers ``[p, C, D]``; ``shared`` is the dimension along which they share a scale."""
    x = torch.randn(shape, generator=generator)
    some = torch.rand(shape, generator=generator) < 0.01
    if kind == "normal":
        return x
    if kind == "outliers":
        return x * torch.where(torch.rand(shape[0], 1, shape[2], generator=generator) < 0.05, 100.0, 1.0)
    if kind == "constant":
        return x.narrow(shared, 0, 1).expand(shape).clone()
    if kind == "zeros":
        x = torch.where(some, 1.0, torch.where(x < 0, -0.0, 0.0))
        x.narrow(shared, 0, 1).fill_(1.0)
        return x
    if kind == "ties":  # from 0 to the largest code in steps of a half: scale 1, zero 0
        x = torch.randint(0, 2 * (2**bits - 1) + 1, shape, generator=generator) / 2
        x.narrow(shared, 0, 1).fill_(0.0)
        if shape[shared] > 1:
            x.narrow(shared, 1, 1).fill_(2.0**bits - 1)
        return x
    if kind == "tiny":
        return x * 1e-7
    if kind == "huge":
        return x * 1e38
    if kind == "infinite":
        return x.masked_fill(some, float("inf")).masked_fill(torch.rand(shape, generator=generator) < 0.01, -torch.inf)
    if kind == "nan":
        return x.masked_fill(some, float("nan"))
    raise ValueError(f"unknown kind of numbers {kind!r}; available: {', '.join(KINDS)}")
