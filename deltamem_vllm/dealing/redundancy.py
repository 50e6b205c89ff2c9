# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Repeated facts are stored once: entries that say what a better one says lose most of their score.

Where a query would have read a repeat that is gone, it reads the entry that was kept, and the attention output moves
only by the difference of the two values. A repeat therefore keeps the share ``1 - similarity`` of its score: nothing if
it is exact, a tenth at a similarity of 0.9.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from deltamem_vllm.dealing.order import newest_first, ordered_bits

# Buckets are two to four times as many as entries: with fewer, strangers with better scores hide a repeat; with more, a
# repeat is more often hashed apart. Measured on 4,096 random entries in pairs of cosine 1, 0.995 and 0.98: three
# tables find 99, 92 and 74 % of the repeats.
_TABLES = 3
_MOST_BITS = 16
_SEED = 20_260_101
# Share of a feature's energy that two entries must differ by before the difference counts in full: without it, the
# rounding of bfloat16 would make strangers of keys that are all alike.
_SLACK = 0.01
# Keeps values of zeros from becoming NaN.
_TINY = 1e-30


def discount_repeats(scores: Tensor, keys: Tensor, values: Tensor, threshold: float) -> Tensor:
    """Lower the scores of entries whose key and value nearly repeat those of a higher-scored entry of their head.

    Entries with similar values share a bucket of a random-hyperplane hash (three tables). In each, every entry is
    compared with the best-scored one that was not itself found to repeat another; that one is then kept as it is. So
    an entry only loses to one that has its full score, and finding it costs one sort and a few passes: O(n log n).
    Some repeats are missed, which costs memory but no quality.

    Keys carry RoPE and their positions are not known, so they are compared by what the rotation leaves alone: the
    length of each rotated pair of elements (d, d + D / 2), the layout of Llama, Qwen and Mistral. Models that rotate
    other pairs, or only some, have fewer repeats found. The similarity of keys a and b is
    ``1 - |a - b| ** 2 / (|a| ** 2 + |b| ** 2)`` of those lengths less their mean over the head, since that mean makes
    all keys alike; that of values is their cosine. The smaller of the two counts.

    Scores shrink towards 0, or towards the lowest of their head where that is negative: an exact repeat ends at the
    bottom of its head. Scores that are not finite stay.

    Parameters
    ----------
    scores: ``[H, n]`` float32, higher = keep; not modified.
    keys: ``[H, n, D]``, RoPE applied, D even.
    values: ``[H, n, D_v]``.
    threshold: similarity from which an entry is a repeat, above 0 and at most 1. Rounding keeps even exact repeats
        a little below 1.

    Returns
    -------
    ``[H, n]`` float32, never above ``scores``.

    Raises
    ------
    ValueError: a shape or number is none of the above.
    """
    _check(scores, keys, values, threshold)
    scores = scores.float()
    lengths = _rotation_free(keys)
    slack = _SLACK * _dot(lengths, lengths).mean(-1, keepdim=True)
    lengths = lengths - lengths.mean(1, keepdim=True)
    energy = _dot(lengths, lengths)
    unit = values.float()
    unit = unit * _dot(unit, unit).clamp_(min=_TINY).rsqrt_().unsqueeze(-1)

    finite = scores.isfinite()
    order = newest_first(ordered_bits(scores))
    position = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    similarity = torch.zeros_like(scores)
    repeats = torch.zeros_like(finite)
    kept = torch.zeros_like(finite)
    bits = min(_MOST_BITS, order.shape[1].bit_length() + 1)
    for bucket in _buckets(unit, bits):
        best = _best_of_bucket(bucket, order, position, repeats, bits)
        apart = lengths - _rows(lengths, best)
        likeness = 1.0 - _dot(apart, apart) / (energy + energy.gather(1, best) + slack)
        likeness = torch.minimum(likeness, _dot(unit, _rows(unit, best)))
        found = (likeness >= threshold) & (position.gather(1, best) < position) & finite & ~repeats & ~kept
        similarity = torch.where(found, likeness.clamp(max=1.0), similarity)
        repeats |= found
        # An entry that stands for others must keep its score in the tables that follow.
        kept |= torch.zeros_like(order).scatter_add_(1, best, found.long()) > 0
    bottom = torch.where(finite, scores, float("inf")).amin(1, keepdim=True).clamp(max=0.0)
    return torch.where(repeats, bottom + (scores - bottom) * (1.0 - similarity), scores)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last dimension."""
    product: Tensor = torch.linalg.vecdot(a, b)
    return product


def _rotation_free(keys: Tensor) -> Tensor:
    """Length of each rotated pair of elements: ``[H, n, D / 2]`` float32."""
    first, second = keys.float().chunk(2, dim=-1)
    return torch.hypot(first, second)


def _buckets(unit: Tensor, bits: int) -> Tensor:
    """Hash of every value in each table: ``[tables, H, n]`` int64. The mean is taken out: it decides most signs."""
    heads, n, dim = unit.shape
    centred = (unit - unit.mean(1, keepdim=True)).view(heads * n, dim)
    signs = (centred @ _planes(dim, bits, unit.device) > 0).view(heads * n, _TABLES, bits)
    # Bits to a number by a product: exact in float32, and several times faster than with integers.
    weights = torch.exp2(torch.arange(bits, device=unit.device).float())
    return (signs.float() @ weights).long().t().reshape(_TABLES, heads, n)


@lru_cache(maxsize=16)
def _planes(dim: int, bits: int, device: torch.device) -> Tensor:
    """``[dim, tables * bits]``; drawn on the CPU, so that every device hashes alike."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(dim, _TABLES * bits, generator=generator).to(device)


def _best_of_bucket(bucket: Tensor, order: Tensor, position: Tensor, repeats: Tensor, bits: int) -> Tensor:
    """For every entry the best one of its bucket that repeats no other (itself if there is none): ``[H, n]`` int64."""
    heads, n = bucket.shape
    place = position.masked_fill(repeats, n)
    first = torch.full((heads, 1 << bits), n, device=bucket.device).scatter_reduce_(1, bucket, place, "amin")
    best = torch.minimum(first.gather(1, bucket), position)
    return order.gather(1, best)


def _rows(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[h, index[h, j]]`` of ``[H, n, D]``."""
    heads, n, dim = rows.shape
    flat = index + torch.arange(heads, device=index.device).unsqueeze(1) * n
    return rows.reshape(heads * n, dim).index_select(0, flat.flatten()).view(heads, n, dim)


def _check(scores: Tensor, keys: Tensor, values: Tensor, threshold: float) -> None:
    if scores.dim() != 2 or keys.dim() != 3 or values.dim() != 3 or 0 in scores.shape:
        raise ValueError(
            "scores must be [H, n] with n >= 1, keys and values [H, n, D], "
            f"got {tuple(scores.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    if keys.shape[:2] != scores.shape or values.shape[:2] != scores.shape or keys.shape[2] % 2 or not values.shape[2]:
        raise ValueError(
            f"keys and values must be [{scores.shape[0]}, {scores.shape[1]}, D] like the scores, with an even D of the "
            f"keys, got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    if not 0.0 < threshold <= 1.0:
        raise ValueError(
            f"threshold must be above 0 and at most 1, got {threshold}; leave the discount out to turn it off"
        )
