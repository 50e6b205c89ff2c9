# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Random eviction: the control every method must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit avalanche hash on int64 lanes (multiplications may wrap: only the low 32 bits are used)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (((x ^ (x >> shift)) & _MASK) * factor) & _MASK
    return x ^ (x >> 16)


class RandomScorer(Scorer):
    """Uniform in [0, 1), a function of (seed, layer, kv head, n, entry) alone.

    A counter-based hash gives the same numbers on every device and rank and leaves global generators alone.
    """

    name = "random"
    summary = "uniform random numbers, reproducible by seed: the control"
    source = "control, no paper"

    def score(self, view: ScoreView) -> Tensor:
        heads, n = view.num_kv_heads, view.num_resident
        device = view.keys.device
        entry = torch.arange(n, dtype=torch.int64, device=device)
        state = torch.arange(view.first_head, view.first_head + heads, dtype=torch.int64, device=device).unsqueeze(1)
        for part in (n, view.layer, view.seed & _MASK, (view.seed >> 32) & _MASK):
            state = _mix(state + part + 0x9E3779B9)
        # 24 bits fit a float32 exactly.
        return (_mix(_mix(state) + entry) >> 8).float().mul_(2.0**-24)
