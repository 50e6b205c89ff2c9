# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""TOVA: what the newest token attends to."""

from __future__ import annotations

from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView


class TOVAScorer(Scorer):
    """Attention of the last query, averaged over the heads of the layer.

    Every kv head of a layer keeps the same tokens. With tensor parallelism the mean is over the heads of one
    rank, so ranks may differ.
    """

    name = "tova"
    summary = "attention of the newest query, averaged over the heads: one choice per layer"
    source = "TOVA, arXiv 2401.06104"
    needs_queries = True
    newest = 1
    over_heads = True

    def score(self, view: ScoreView) -> Tensor:
        mean = view.attention(last=1).mean((0, 1, 2))  # [n]
        return mean.expand(view.num_kv_heads, -1).contiguous()
