# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Predictor and TOVA: what a calibration expects of an entry, or what the newest query looks at."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.predictor import PredictorScorer


class PredictorTOVAScorer(PredictorScorer):
    """Half of what is kept is the predictor's choice and half TOVA's; entries that both choose leave room for more.

    The predictor does not know what is asked, the newest query knows nothing else. Their scores have no common unit,
    so attention is only asked for an order: the entry that it ranks k-th counts as much as the predictor's own k-th.
    An entry's score is the larger of the two. Heads are not compared by it: at a tenth of the memory, pages dealt by
    the calibration's profile alone kept more answers than by these scores and the profile.

    An entry keeps the score that it got when it was rated first, by the newest query of that time. As with TOVA, the
    query's attention is a mean over the heads of one tensor-parallel rank, so ranks may differ.
    """

    name = "predictor-tova"
    summary = "half of it what the calibration predicts, half what the newest query attends to"
    source = "deltamem; TOVA is arXiv 2401.06104"
    needs_queries = True
    newest = 1
    comparable = False
    over_heads = True

    def score(self, view: ScoreView) -> Tensor:
        expected = super().score(view)
        looked_at = view.attention(last=1).mean((0, 1, 2))  # [n]
        return with_order_of(expected, looked_at.expand_as(expected))


def with_order_of(scores: Tensor, other: Tensor) -> Tensor:
    """The larger of an entry's own score and the one that has its rank in another order.

    Parameters
    ----------
    scores, other
        ``[..., n]`` float32. Of entries that are equal in ``other`` the newer, the later one, ranks first.

    Returns
    -------
    Tensor
        ``[..., n]`` float32: the best m entries by it hold the best m // 2 of both orders, ties in ``scores`` apart.
    """
    best_first = scores.sort(dim=-1, descending=True).values
    # The last of equals comes first if the entries are sorted back to front.
    order = other.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    place = torch.empty_like(order)
    place.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return torch.maximum(scores, best_first.gather(-1, place.flip(-1)))
