# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""KeyDiff: keep keys that differ from the rest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView


class KeyDiffScorer(Scorer):
    """Negative cosine similarity of a key to the mean direction of all keys.

    Distinct keys tend to draw attention, and no query is needed to find them.
    """

    name = "keydiff"
    summary = "keys least similar to the mean key direction; needs no queries"
    source = "KeyDiff, arXiv 2504.15364"

    def score(self, view: ScoreView) -> Tensor:
        direction = F.normalize(view.keys_f32, dim=-1)
        anchor = F.normalize(direction.mean(1), dim=-1)  # [H_kv, D]
        return (direction @ anchor.unsqueeze(-1)).squeeze(-1).neg_()
