# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""SnapKV: attention of the observation window, smoothed over neighbours."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView

_KERNEL = 7


class SnapKVScorer(Scorer):
    """Mean attention of the window queries, max-pooled over 7 neighbouring entries.

    Pooling keeps what surrounds a hit together with it. As in the paper the window itself is outside the
    pooling and always kept: its entries get the highest score of their head. Queries that share a kv head are
        averaged.
    """

    name = "snapkv"
    summary = "mean attention of the last queries, max-pooled over 7 neighbours"
    source = "SnapKV, arXiv 2404.14469"
    needs_queries = True

    def score(self, view: ScoreView) -> Tensor:
        weights = view.attention()
        prefix = view.num_resident - weights.shape[2]
        mean = weights.mean((1, 2))  # [H_kv, n]
        if prefix == 0:
            return mean.fill_(1.0)
        pooled = F.max_pool1d(mean[:, :prefix].unsqueeze(0), _KERNEL, stride=1, padding=_KERNEL // 2)[0]
        mean[:, :prefix] = pooled
        mean[:, prefix:] = pooled.amax(-1, keepdim=True)
        return mean
