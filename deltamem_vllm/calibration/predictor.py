# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Fits the predictor: a linear map per (layer, kv head) from an entry's key and value to what the entry will be worth.

What it is worth is the most attention it got in the repeat pass, on a logarithmic scale: attention spans many orders of
magnitude, and only its order and its ratios matter. Ridge regression in closed form: sums over all texts, one system
of equations per head, nothing drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.profile import shares
from deltamem_vllm.scoring.features import feature_parts

LOG_FLOOR = 1e-3
"""Added to the attention before the logarithm: what got far less was not looked at, and how much less says nothing."""
RIDGE = 1e-4
"""Of the mean diagonal of X'X, added to the diagonal."""
KEEP_RATIOS = (0.25, 0.1)


def target_of(peaks: Tensor) -> Tensor:
    """What is predicted of entries with these maximum attention weights: their logarithm, float64, same shape."""
    return torch.log(peaks.double() + LOG_FLOOR)


class PredictorFit:
    """Sums of ridge regression for every (layer, kv head); takes in one layer of one text at a time.

    Memory is ``F * F`` float64 per pair, however many texts there are.
    """

    def __init__(self) -> None:
        self._products: dict[int, Tensor] = {}
        self._moments: dict[int, Tensor] = {}

    def add(self, layer: int, keys: Tensor, values: Tensor, peaks: Tensor, entries: range) -> None:
        """Learn from one layer of one text.

        Parameters
        ----------
        layer : int
            Its index.
        keys, values : Tensor
            [kv heads, n, D] and [kv heads, n, D_v], any floating point, RoPE applied: all that was in the cache.
        peaks : Tensor
            [kv heads, len(entries)], the most attention each of `entries` got.
        entries : range
            Which of the n to learn from, step 1.
        """
        phi = _features(keys, values, entries).double()
        target = target_of(peaks).to(phi.device)
        products, moments = (phi.mT @ phi).cpu(), (phi.mT @ target.unsqueeze(2)).squeeze(2).cpu()
        if layer in self._products:
            products += self._products[layer]
            moments += self._moments[layer]
        self._products[layer], self._moments[layer] = products, moments

    def solve(self) -> Tensor:
        """The weights, [layers, kv heads, features] float32, in the order of `scoring.features`."""
        return torch.stack([self._solve(layer) for layer in sorted(self._products)])

    def _solve(self, layer: int) -> Tensor:
        products = self._products[layer]
        ridge = RIDGE * products.diagonal(dim1=1, dim2=2).mean(1)
        damped = products + ridge[:, None, None] * torch.eye(products.shape[1], dtype=products.dtype)
        weights: Tensor = torch.linalg.solve(damped, self._moments[layer])
        return weights.float()


@dataclass(frozen=True)
class Entries:
    """What one text left in the cache, and which of it was looked at how much.

    Attributes
    ----------
    keys, values : sequence of Tensor
        By layer, [kv heads, n, D] and [kv heads, n, D_v].
    peaks : Tensor
        [layers, kv heads, len(watched)] float32.
    watched : range
        The entries that `peaks` is of.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    peaks: Tensor
    watched: range


def learn(fit: PredictorFit, text: Entries) -> None:
    """Take in all layers of a text."""
    for layer, (keys, values) in enumerate(zip(text.keys, text.values, strict=True)):
        fit.add(layer, keys, values, text.peaks[layer], text.watched)


def predict(weights: Tensor, text: Entries) -> Tensor:
    """The expected target of the watched entries, [layers, kv heads, entries] float32 on the CPU."""
    rows = []
    for own, keys, values in zip(weights, text.keys, text.values, strict=True):
        phi = _features(keys, values, text.watched)
        rows.append((phi @ own.to(phi.device).unsqueeze(2)).squeeze(2).cpu())
    return torch.stack(rows)


def held_out_metrics(weights: Tensor, profile: Tensor, text: Entries) -> dict[str, Any]:
    """How well weights and a profile that have not seen a text predict it; JSON values for the card.

    Parameters
    ----------
    weights : Tensor
        [layers, kv heads, features], of other texts.
    profile : Tensor
        [layers, kv heads, quantiles], of the same others: what `kept.random` shares memory out by.
    text : Entries
        The one to predict.

    Returns
    -------
    dict
        `r2`: share of the target's variance that is explained, over all entries of all heads. `r2_within_heads`: the
        same with each head's variance about its own mean. `spearman`: rank correlation within a head, mean over
        the heads whose entries differ. `kept`: by keep ratio, the share of all attention maxima that stays when
        entries of all heads are ranked together by the prediction (`predictor`) and by what came out (`oracle`), and
        when each head keeps the share that the profile gives it, but of random entries (`random`).
    """
    expected, target, peaks = predict(weights, text).double(), target_of(text.peaks), text.peaks.double()
    left = (target - expected).square().sum()
    within = (target - target.mean(-1, keepdim=True)).square().sum()
    kept = {}
    for ratio in KEEP_RATIOS:
        count = round(ratio * peaks.numel())
        total = peaks.sum()
        chosen = {
            "predictor": peaks.flatten()[expected.flatten().topk(count).indices].sum() / total,
            "oracle": peaks.flatten().topk(count).values.sum() / total,
            "random": (peaks.sum(-1) * shares(profile, ratio)).sum() / total,
        }
        kept[f"{ratio:g}"] = {name: _rounded(share) for name, share in chosen.items()}
    return {
        "r2": _rounded(1 - left / (target - target.mean()).square().sum()),
        "r2_within_heads": _rounded(1 - left / within),
        "spearman": _rounded(rank_correlation(expected, target).nanmean()),
        "kept": kept,
    }


def _rounded(number: Tensor) -> float | None:
    """For JSON, which has no nan: None where there is nothing to measure, such as with a text of one token."""
    return round(number.item(), 4) if bool(number.isfinite()) else None


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation along the last dimension, equal numbers at their mean rank; nan where all are equal."""
    one, other = (_ranks(x.double()) for x in (first, second))
    one, other = (x - x.mean(-1, keepdim=True) for x in (one, other))
    lengths: Tensor = torch.linalg.vector_norm(one, dim=-1) * torch.linalg.vector_norm(other, dim=-1)
    return (one * other).sum(-1) / lengths


def _ranks(x: Tensor) -> Tensor:
    order = x.sort(-1).values.contiguous()
    below = torch.searchsorted(order, x.contiguous())
    upto = torch.searchsorted(order, x.contiguous(), right=True)
    return (below + upto).double() / 2


def _features(keys: Tensor, values: Tensor, entries: range) -> Tensor:
    """[kv heads, len(entries), features] float32. Means are over all keys and values, as where entries are rated."""
    every = torch.cat(feature_parts(keys, values), -1)
    return every[:, entries.start : entries.stop]
