# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Scores that stay with the entries they were given to, so that a compaction rates only what is new since the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.scoring.seen import Seen


@dataclass(frozen=True)
class Rated:
    """What the dealt entries of a request were rated, and what its heads have seen.

    Memory is 4 bytes an entry and head: under 1% of keys and values of 128 dimensions in 16 bits, 1.6% of those of 64.

    Attributes
    ----------
    scorer
        That gave the scores.
    scores
        ``[L, H, W]`` float32 in token order, of the entries in the dealt pages; ``-inf`` past a pair's last.
    seen
        Over all entries that were rated, ``[L, H, ...]``.
    """

    scorer: str
    scores: Tensor
    seen: Seen


def of_survivors(scorer: str, scores: Tensor, keep: Tensor, seen: Seen, widest: int) -> Rated:
    """Keep the scores of the entries that stay.

    Parameters
    ----------
    scores, keep
        ``[L, H, N]`` float32 and bool, of all entries in token order.
    seen
        Over all of them and all before.
    widest
        Most entries that a pair keeps.
    """
    # Those that go are written behind the last column, which is then cut off.
    column = torch.where(keep, keep.cumsum(2) - 1, widest)
    kept = scores.new_full((*scores.shape[:2], widest + 1), float("-inf")).scatter_(2, column, scores)
    return Rated(scorer, kept[..., :widest].contiguous(), seen)


def with_tail(rated: Rated, counts: Tensor, tail: Tensor) -> Tensor:
    """Scores of the dealt entries and behind them those of the tail, ``[L, H, most entries of a pair]``.

    Parameters
    ----------
    rated
        Of the last compaction.
    counts
        ``[L, H]`` int64, dealt entries of each pair.
    tail
        ``[L, H, t]`` float32, of the entries after it.
    """
    layers, heads, length = tail.shape
    dealt = rated.scores.shape[2]
    scores = tail.new_full((layers, heads, dealt + length), float("-inf"))
    scores[..., :dealt] = rated.scores
    column = counts.unsqueeze(2) + torch.arange(length, device=tail.device)
    return scores.scatter_(2, column, tail)
