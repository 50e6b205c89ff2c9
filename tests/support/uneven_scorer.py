# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A scorer under which (layer, kv head) pairs deserve very different amounts of memory.

Heads of random weights are all alike, so a global choice over their true scores comes out nearly equal, and equal
page counts would hide a table that is read for the wrong head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.scoring import registry
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.delta import DeltaScorer


class UnevenScorer(DeltaScorer):
    """The delta-score, times a factor between 1/20 and 20 that differs from pair to pair."""

    name = "uneven"
    summary = "delta-score with the heads' levels driven apart"
    source = "tests"
    comparable = True

    def score(self, view: ScoreView) -> Tensor:
        # A view does not say which heads it holds; the first token's key, which is never evicted, tells them apart.
        head = view.keys_f32[:, :1].sum(-1)
        return super().score(view) * torch.exp(3.0 * torch.sin(2.0 * head + view.layer))


def register() -> None:
    """Make ``scorer = "uneven"`` known in this process."""
    registry.BUILTIN[UnevenScorer.name] = f"{__name__}:{UnevenScorer.__name__}"
