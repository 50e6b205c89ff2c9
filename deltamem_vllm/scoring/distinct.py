# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Distinct: how much an entry stands out among its head's keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView


class DistinctScorer(Scorer):
    """Distance of the key's direction from the mean direction, times distance of the value from the mean value.

    The delta-score of a query nobody has seen yet. Taking an entry away moves an attention output by about
    ``a * ||v - o||``. Nothing is known of the query, so ``o`` is the mean value, and for the weight ``a`` stands how
    easily a query can single the entry out: ``1 - cos(k, mean k)``, the measure of KeyDiff.

    Both factors are small for a head that keeps saying the same, whose memory is not worth much then: the scores may
    be compared across heads and layers, without a calibration.
    """

    name = "distinct"
    summary = "keys and values that differ most from their head's mean; needs no queries, compares across heads"
    source = "deltamem; the key's factor as in KeyDiff, arXiv 2504.15364, the value's as in CAOTE, arXiv 2504.14051"
    comparable = True

    def score(self, view: ScoreView) -> Tensor:
        direction = F.normalize(view.keys_f32, dim=-1)
        anchor = F.normalize(direction.mean(1), dim=-1)  # [H_kv, D]
        apart = (direction @ anchor.unsqueeze(-1)).squeeze(-1).neg_().add_(1.0)
        values = view.values_f32
        moved = (values - values.mean(1, keepdim=True)).norm(dim=-1)
        return apart.mul_(moved)
