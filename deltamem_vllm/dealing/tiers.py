# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How a (layer, kv head) pair would best use n pages, for every n: which are hot and which are cold.

A hot page holds ``block_size`` tokens exactly, a cold page several times as many, each of which is worth a little less:
``loss`` is the share of its utility that a token loses with its bits. A pair's best tokens fill its hot pages, the next
best its cold ones. So a pair that can hold all its tokens in cold pages spends further pages on making its best ones
hot, and one that cannot rather keeps more of them: the price of a page decides, not a fixed share of either tier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.ops import deal_pages as native


@dataclass(frozen=True)
class TierPath:
    """The use that every pair would make of n pages.

    Attributes
    ----------
    gains: ``[L, H, P]`` float32, what page n + 1 adds; ``+inf`` for the first ``floor``, ``-inf`` for pages that a pair
        cannot fill. Not sorted: a page may be worth more than the one before it.
    hot: ``[L, H, P + 1]`` int64, how many of n pages are hot; means nothing where a pair cannot fill n.
    """

    gains: Tensor
    hot: Tensor


def tier_path(worth: Tensor, lengths: Tensor, block_size: int, capacity: int, loss: float, floor: int) -> TierPath:
    """Split 0, 1, 2 ... pages of every pair into hot and cold ones, in the best way there is.

    With h of n pages hot, a pair has ``loss * T(h * block_size) + (1 - loss) * T(h * block_size + (n - h) * capacity)``
    if T is what its so many best tokens are worth. T bends downwards, since better tokens come first, and so does this
    as h grows. The best h is where it stops to rise; all n are searched at once by halving. Of equal splits the hotter
    is taken.

    Parameters
    ----------
    worth: ``[L, H, N]`` float >= 0, what each token of a pair is worth, those that are kept first first. It must not
        increase behind the first ``floor`` pages.
    lengths: ``[L, H]`` int64, tokens of each pair, at most N; what stands past them is ignored.
    block_size, capacity: tokens of a hot and at most of a cold page; ``capacity > block_size``.
    loss: share of its worth that a cold token loses, 0 to 1.
    floor: hot pages that every pair has.

    Raises
    ------
    ValueError: a shape or number is none of the above. Values are checked on CPU only, and never ``worth``.
    """
    _check(worth, lengths, block_size, capacity, loss, floor)
    natively = native.tier_path(worth, lengths, block_size, capacity, loss, floor)
    if natively is not None:
        return TierPath(*natively)
    device = worth.device
    within = torch.arange(worth.shape[2], device=device) < lengths.unsqueeze(2)
    total = torch.nn.functional.pad(torch.where(within, worth, 0.0).double().cumsum(2), (1, 0))
    most = -(-worth.shape[2] // block_size)
    ends = lengths.unsqueeze(2)
    pages = torch.arange(most + 1, device=device).expand(*lengths.shape, -1)

    def value(hot: Tensor) -> Tensor:
        """Worth of every number of pages with so many of them hot."""
        start = hot * block_size
        end = torch.minimum(start + (pages - hot) * capacity, ends)
        return loss * total.gather(2, start) + (1.0 - loss) * total.gather(2, end)

    # A hot page is full, and the last cold one has a token. With too many pages nothing is between these ends.
    low = (((pages - 1) * capacity - ends).div(capacity - block_size, rounding_mode="floor") + 1).clamp(min=floor)
    high = torch.minimum(pages, ends // block_size)
    exists = (low <= high) & (pages >= floor)
    hot = low = torch.minimum(low, high)
    for _ in range(most.bit_length()):
        middle = (hot + high + 1) // 2
        rises = (value(middle) >= value((middle - 1).clamp(min=0))) | (middle == hot)
        hot, high = torch.where(rises, middle, hot), torch.where(rises, high, middle - 1)
    best = value(hot)
    gains = torch.where(exists[..., 1:], best.diff(dim=2), -torch.inf).float()
    gains[..., :floor] = torch.inf
    return TierPath(gains, hot)


def _check(worth: Tensor, lengths: Tensor, block_size: int, capacity: int, loss: float, floor: int) -> None:
    if worth.dim() != 3 or not worth.is_floating_point() or 0 in worth.shape:
        raise ValueError(f"worth must be a float [L, H, N] without an empty dimension, got {tuple(worth.shape)}")
    if lengths.shape != worth.shape[:2] or lengths.dtype != torch.int64:
        raise ValueError(f"lengths must be int64 {tuple(worth.shape[:2])}, got {lengths.dtype} {tuple(lengths.shape)}")
    if not 1 <= block_size < capacity or not 0.0 <= loss <= 1.0:
        raise ValueError(
            "a cold page must hold more tokens than a hot one and lose a share of their worth between 0 and 1, "
            f"got {block_size=}, {capacity=}, {loss=}"
        )
    shortest = floor * block_size
    if lengths.device.type == "cpu":
        shortest, longest = int(lengths.min()), int(lengths.max())
        if not 0 <= shortest <= longest <= worth.shape[2]:
            raise ValueError(f"lengths must lie between 0 and {worth.shape[2]}, got {shortest} to {longest}")
    if floor < 0 or floor * block_size > shortest:
        raise ValueError(f"every pair must fill {floor} hot pages of {block_size}, but one has {shortest} tokens")
