# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Ranks, shares of memory and retained mass: pure functions on arrays over (layer, kv head, token)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_]


def rank_in_head(utility: Array) -> NDArray[np.float32]:
    """Rank of each token within its layer and head: [L, H_kv, n] in 0 (lowest) to 1; equal utilities share one."""
    n = utility.shape[2]
    ranks = np.empty(utility.shape, dtype=np.float32)
    for at in np.ndindex(*utility.shape[:2]):
        _, inverse, counts = np.unique(utility[at], return_inverse=True, return_counts=True)
        first = np.cumsum(counts) - counts
        ranks[at] = ((first + (counts - 1) / 2) / max(n - 1, 1))[inverse]
    return ranks


def deal(utility: Array, keep: int, sinks: int, recent: int) -> Mask:
    """What each layer and head would hold if one ranking of all utilities dealt out the same memory, by tokens.

    The budget is `L * H_kv * keep` tokens, what equal shares take. Every head holds its first `sinks` and last
    `recent` tokens first, as in the engine; the rest goes to the highest utilities wherever they are. Of equal
    utilities the newer token wins, then the lower layer and head. NaN ranks last. Counted in tokens: dealing whole
    pages would round each head's number up or down to them.

    Parameters
    ----------
    utility
        [L, H_kv, n].
    keep
        Tokens a head would hold with equal shares, `sinks + recent <= keep <= n`.

    Returns
    -------
    [L, H_kv, n], the tokens held.
    """
    layers, heads, n = utility.shape
    _check_keep(keep, sinks, recent, n)
    held = np.zeros(utility.shape, dtype=bool)
    held[..., :sinks] = True
    held[..., n - recent :] = True
    left = layers * heads * keep - int(held.sum())
    values = np.where(np.isnan(utility), -np.inf, utility)
    head, token = np.nonzero(~held.reshape(layers * heads, n))
    order = np.lexsort((head, -token, -values.reshape(layers * heads, n)[head, token]))[:left]
    held.reshape(layers * heads, n)[head[order], token[order]] = True
    return held


def equal_split(utility: Array, keep: int, sinks: int, recent: int) -> Mask:
    """What each layer and head holds if all keep the same number: the engine's choice where `dealing` is `equal`.

    First `sinks` and last `recent` tokens, then the highest utilities of the head; of equal ones the newer token. NaN
    ranks last.

    Parameters
    ----------
    utility
        [L, H_kv, n].
    keep
        Tokens of each head, `sinks + recent <= keep <= n`.

    Returns
    -------
    [L, H_kv, n], the tokens held.
    """
    n = utility.shape[2]
    _check_keep(keep, sinks, recent, n)
    values = np.where(np.isnan(utility), -np.inf, utility)
    protected = np.zeros(utility.shape, dtype=bool)
    protected[..., :sinks] = True
    protected[..., n - recent :] = True
    newer_first = np.broadcast_to(-np.arange(n), utility.shape)
    order = np.lexsort((newer_first, -values, ~protected), axis=2)
    held = np.zeros(utility.shape, dtype=bool)
    np.put_along_axis(held, order[..., :keep], True, axis=2)
    return held


def held_mass(weights: Array, held: Mask) -> NDArray[np.float64]:
    """Share of each head's total weight on the tokens it holds: [L, H_kv] in 0 to 1; weights must be >= 0.

    1 where a head has no weight at all: nothing was lost.
    """
    if (weights < 0).any():
        raise ValueError("a mass needs weights >= 0")
    total = weights.sum(2, dtype=np.float64)
    kept = np.where(held, weights, 0).sum(2, dtype=np.float64)
    share: NDArray[np.float64] = np.divide(kept, total, out=np.ones_like(total), where=total > 0)
    return share


def bin_tokens(values: Array, width: int, how: Literal["mean", "max"]) -> NDArray[np.float64]:
    """Reduce the last axis, tokens, to bins of `width`; the last bin may be narrower."""
    starts = np.arange(0, values.shape[-1], width)
    if how == "max":
        return np.maximum.reduceat(values, starts, axis=-1).astype(np.float64)
    sums = np.add.reduceat(values.astype(np.float64), starts, axis=-1)
    means: NDArray[np.float64] = sums / np.diff(np.append(starts, values.shape[-1]))
    return means


def bin_width(tokens: int, most_bins: int) -> int:
    """The narrowest bin with which `tokens` fit into `most_bins`."""
    return max(1, -(-tokens // most_bins))


def _check_keep(keep: int, sinks: int, recent: int, n: int) -> None:
    if not sinks + recent <= keep <= n:
        raise ValueError(f"keep must be {sinks + recent} (protected) to {n} (resident), got {keep}")
