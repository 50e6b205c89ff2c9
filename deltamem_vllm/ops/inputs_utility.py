# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Random requests to be scored in their pages, and random scores to be dealt by, for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.ops.inputs_attention import make_attention
from deltamem_vllm.ops.layout import PageLayout

SCORES = ("normal", "peaked", "ties", "equal", "awkward")
"""Kinds of scores: any, few that hold most of the sum, few values, one value, and what is no ordinary number."""

_FEW = (0.0, -0.0, 0.25, 0.5, 1.0, 3.0)
_AWKWARD = (*_FEW, -1.0, -2.5, math.nan, math.inf, -math.inf, 1e-40, 3e38, -3e38)


@dataclass(frozen=True)
class UtilityCase:
    """One call. Pages are spread over the whole pool; what nobody owns, free slots included, is NaN.

    Attributes
    ----------
    queries: ``[S, G, w, D]`` contiguous.
    pool: ``[num_pages, block_size * 2 * D]``.
    hot: layout of its pages.
    block_table, seq_lens: int32 ``[S, W]`` and ``[S]``; entries past a sequence's pages are no pages.
    scale: factor on q.k.
    weights: ``[S, features]`` float32 of a predictor that nobody fitted.
    """

    queries: Tensor
    pool: Tensor
    hot: PageLayout
    block_table: Tensor
    seq_lens: Tensor
    scale: float
    weights: Tensor

    @property
    def window(self) -> tuple[Tensor, Tensor, PageLayout, Tensor, Tensor, float]:
        """The arguments of scores by a window of queries."""
        return self.queries, self.pool, self.hot, self.block_table, self.seq_lens, self.scale

    @property
    def pages(self) -> tuple[Tensor, PageLayout, Tensor, Tensor]:
        """The arguments of scores by keys and values alone."""
        return self.pool, self.hot, self.block_table, self.seq_lens


def make_utility(
    layout: str,
    dtype: torch.dtype,
    dim: int,
    block_size: int,
    group: int,
    window: int,
    lengths: Sequence[int],
    *,
    peaked: float = 1.0,
    seed: int = 0,
) -> UtilityCase:
    """Sequences of so many tokens, each with a window of ``group * window`` queries.

    Parameters
    ----------
    layout: one of `inputs.LAYOUTS`.
    peaked: factor on the queries; with 8 and more, single tokens get nearly all attention.
    """
    case = make_attention(layout, dtype, dim, block_size, group, [0] * len(lengths), lengths, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(len(lengths), group, window, dim, generator=generator) * peaked
    weights = torch.randn(len(lengths), 1 + dim + dim // 2 + dim + 4, generator=generator) * (0.4 / dim**0.5)
    return UtilityCase(queries.to(dtype), case.pool, case.hot, case.block_table, case.seq_lens, case.scale, weights)


def make_scores(kind: str, lengths: Tensor, tokens: int, seed: int) -> Tensor:
    """Scores ``[L, H, tokens]`` float32 of pairs of so many tokens ``[L, H]``; NaN, infinity and others past them.

    Parameters
    ----------
    kind: one of `SCORES`.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (*lengths.shape, tokens)
    if kind == "normal":
        scores = torch.randn(shape, generator=generator)
    elif kind == "peaked":
        scores = torch.rand(shape, generator=generator) ** (12 * torch.rand(*lengths.shape, 1, generator=generator))
    elif kind == "equal":
        scores = torch.full(shape, 0.5)
    elif kind in ("ties", "awkward"):
        values = torch.tensor(_FEW if kind == "ties" else _AWKWARD)
        scores = values[torch.randint(len(values), shape, generator=generator)]
    else:
        raise ValueError(f"unknown kind of scores {kind!r}; available: {', '.join(SCORES)}")
    behind = torch.tensor([math.nan, math.inf, 1e9])[torch.randint(3, shape, generator=generator)]
    return torch.where(torch.arange(tokens) < lengths.unsqueeze(2), scores, behind)
