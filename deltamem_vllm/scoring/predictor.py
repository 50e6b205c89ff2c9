# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Predictor: what a calibration learned to expect of an entry from its key and value."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView
from deltamem_vllm.scoring.features import feature_parts, feature_widths


class PredictorScorer(Scorer):
    """What an entry will be worth, by a linear map that each kv head has of its own.

    ``exp(w . phi)``: the largest share of a query's attention that an entry is expected to get when its text is looked
    up, times how far its value reaches, with ``w`` of `deltamem calibrate` (`deltamem_vllm.calibration.predictor`) and
    ``phi`` of `deltamem_vllm.scoring.features`. One unit for all heads and layers, so scores compare.
    """

    name = "predictor"
    summary = "attention to come and what it will move, as the model's calibration predicts; compares across heads"
    source = "deltamem; learns KVzip's attention, arXiv 2505.23416, times the reach of values, arXiv 2502.03805"
    comparable = True
    lasting = True
    learned = "predictor"

    def __init__(self) -> None:
        self._weights: Tensor | None = None

    def bind(self, learned: Tensor) -> None:
        """Take the weights, ``[layers, kv heads of this rank, features]`` float32 on the device of the views."""
        self._weights = learned

    def weights(self, layers: slice, heads: slice, features: int) -> Tensor:
        """What was bound for these layers and heads, ``[layers, heads, features]`` float32.

        Raises
        ------
        ValueError: nothing was bound, or weights of other heads or of another number of features.
        """
        if self._weights is None:
            raise ValueError("scorer 'predictor' has no weights: bind those of a calibration (`deltamem calibrate`)")
        own = self._weights[layers, heads]
        if own.shape[1:] != (heads.stop - heads.start, features):
            raise ValueError(
                f"weights are for {self._weights.shape[1]} kv heads and {self._weights.shape[2]} features, but heads "
                f"{heads.start} to {heads.stop - 1} with {features} features are asked for; calibrate the model that "
                "is served"
            )
        return own

    def score(self, view: ScoreView) -> Tensor:
        keys, values = view.keys_f32, view.values_f32
        widths = feature_widths(keys.shape[2], values.shape[2])
        heads = slice(view.first_head, view.first_head + view.num_kv_heads)
        weights = self.weights(slice(view.layer, view.layer + 1), heads, sum(widths))[0]
        expected = torch.zeros(keys.shape[:2], device=keys.device)
        for part, weight in zip(
            feature_parts(keys, values, view.seen), torch.split(weights, list(widths), 1), strict=True
        ):
            expected += (part @ weight.unsqueeze(2)).squeeze(2)
        return expected.exp_()
