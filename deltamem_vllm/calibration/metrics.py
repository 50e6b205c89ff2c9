# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How well a calibration predicts texts that it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.predictor import Entries, predict, target_of
from deltamem_vllm.calibration.profile import shares

KEEP_RATIOS = (0.25, 0.1)


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
        the heads whose entries differ. `kept`: by keep ratio, the share of all worth that stays when
        entries of all heads are ranked together by the prediction (`predictor`) and by what came out (`oracle`), and
        when each head keeps the share that the profile gives it, but of random entries (`random`).
    """
    return prediction_metrics(predict(weights, text), profile, text)


def prediction_metrics(expected: Tensor, profile: Tensor, text: Entries) -> dict[str, Any]:
    """What `held_out_metrics` returns, for a prediction that was made: ``expected`` [layers, kv heads, watched]."""
    expected, target, worth = expected.double(), target_of(text.worth), text.worth.double()
    left = (target - expected).square().sum()
    within = (target - target.mean(-1, keepdim=True)).square().sum()
    kept = {}
    for ratio in KEEP_RATIOS:
        count = round(ratio * worth.numel())
        total = worth.sum()
        chosen = {
            "predictor": worth.flatten()[expected.flatten().topk(count).indices].sum() / total,
            "oracle": worth.flatten().topk(count).values.sum() / total,
            "random": (worth.sum(-1) * shares(profile, ratio)).sum() / total,
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


def mean_metrics(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of what `held_out_metrics` returned for several texts, number by number; None are left out."""
    mean: dict[str, Any] = {}
    for name, first in found[0].items():
        of_all = [one[name] for one in found]
        if isinstance(first, Mapping):
            mean[name] = mean_metrics(of_all)
        else:
            numbers = [number for number in of_all if number is not None]
            mean[name] = round(sum(numbers) / len(numbers), 4) if numbers else None
    return mean
