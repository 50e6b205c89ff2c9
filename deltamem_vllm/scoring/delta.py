# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The delta-score: how far the attention output moves when one entry is taken away."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView


class DeltaScorer(Scorer):
    """Delta-score: the distance the output moves without this entry.

    A query with weights ``a`` over the resident entries has the output ``o = sum_i a_i v_i``. Without entry j
    the other weights grow by ``1 / (1 - a_j)`` and the output moves by exactly
    ``a_j / (1 - a_j) * ||v_j - o||``. An entry scores the largest move it causes to any query of the window
    and of the group: one query that needs it is enough to keep it. An entry that is all a query sees scores
    ``||v_j||``. The closed form is that of CAOTE; the maximum over queries and group is ours.
    """

    name = "delta"
    summary = "how far the attention output moves if the entry is taken away (largest over window and group)"
    source = "closed form as in CAOTE, arXiv 2504.14051; maximum over window and group: deltamem"
    needs_queries = True

    def score(self, view: ScoreView) -> Tensor:
        logits = view.logits().flatten(1, 2)  # [H_kv, R, n] with R = G * w queries
        values = view.values_f32
        # The heaviest entry of each query is taken out and treated apart: only its weight can come near 1,
        # where both 1 - a and v - o would be rounding noise. Every other entry has a <= 1/2.
        top, where = logits.max(-1, keepdim=True)  # [H_kv, R, 1]
        logits.scatter_(-1, where, float("-inf"))
        second = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
        others = logits.sub_(second).exp_()
        total = others.sum(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        margin = top - second - total.log()
        top_weight, rest_weight = margin.sigmoid(), margin.neg().sigmoid()

        without = (others @ values).div_(total)  # [H_kv, R, D] the output if the top entry were gone
        step = values.gather(1, where.expand(-1, -1, values.shape[-1])).sub_(without).mul_(top_weight)
        output = without + step

        # ||v - o||^2 expanded, so that no [H_kv, R, n, D] difference exists.
        norm2 = torch.linalg.vector_norm(values, dim=-1).square_().unsqueeze(1)
        moved2 = torch.baddbmm(norm2, output, values.transpose(1, 2), alpha=-2.0)
        moved2.add_(output.square().sum(-1, keepdim=True))
        # (1 - a) / a: inf where a is 0 (hidden, vanished, or the top entry), and dividing by that gives 0.
        odds_against = others.mul_(rest_weight / total).reciprocal_().sub_(1.0)
        # The root comes after the maximum: fewer of them. Rounding may leave a square below zero.
        scores = moved2.div_(odds_against).div_(odds_against).amax(1).clamp_(min=0.0).sqrt_()
        moved_top = torch.linalg.vector_norm(step, dim=-1)  # [H_kv, R]
        return scores.scatter_reduce_(1, where.squeeze(-1), moved_top, "amax")
