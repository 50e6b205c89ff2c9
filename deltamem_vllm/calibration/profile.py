# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The head profile: what an entry of each rank is worth in each layer and kv head, and the shares that follow."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILES = 128
KEEP_RATIOS = (0.5, 0.25, 0.1, 0.05)


def rank_profile(worth: Tensor, quantiles: int = QUANTILES) -> Tensor:
    """Utility of an entry by its rank: sort each pair's entries, descending, and average them in equal bins.

    Parameters
    ----------
    worth : Tensor
        [layers, kv heads, entries] float32, the utility of each entry of one text.
    quantiles : int
        Bins. A bin border inside an entry splits it, so that any number of entries will do.

    Returns
    -------
    Tensor
        [layers, kv heads, quantiles] float32, non-increasing; bin i is about rank quantile (i + 0.5) / quantiles.
        Its mean is that of the entries.
    """
    count = worth.shape[-1]
    ranked = worth.double().sort(-1, descending=True).values
    total = torch.cat([torch.zeros_like(ranked[..., :1]), ranked.cumsum(-1)], -1)
    border = torch.arange(quantiles + 1, dtype=torch.float64) * count / quantiles
    whole = border.long().clamp(max=count - 1)
    upto = total[..., whole] + (border - whole) * ranked[..., whole]
    # Rounding in the running sum may turn equal bins by the last bit.
    return (upto.diff(dim=-1) * quantiles / count).clamp(min=0).cummin(-1).values.float()


def shares(profile: Tensor, keep_ratio: float) -> Tensor:
    """Share of its entries that each pair keeps when the best of all pairs together stay.

    Parameters
    ----------
    profile : Tensor
        [layers, kv heads, quantiles], see `rank_profile`.
    keep_ratio : float
        Share of all entries that stays.

    Returns
    -------
    Tensor
        [layers, kv heads] float32, with mean `keep_ratio` up to one bin. Of equal bins the earlier pair's stay.
    """
    flat = profile.flatten()
    kept = torch.zeros_like(flat, dtype=torch.float32)
    kept[flat.argsort(descending=True, stable=True)[: round(keep_ratio * len(flat))]] = 1
    return kept.view(profile.shape).mean(-1)
