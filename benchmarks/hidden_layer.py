# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A predictor with a hidden layer, for comparison: what a linear map leaves over, learned by a tiny network per head.

No server uses it. It is learned from some entries of each text, since a closed form over sums does not exist for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_vllm.calibration.predictor import Entries, predict, target_of
from deltamem_vllm.calibration.recipe import RECIPE


class HiddenLayer:
    """``linear(x) + down(gelu(up(x)))`` for every (layer, kv head), x being the features, each at unit variance.

    Parameters
    ----------
    units: of the hidden layer.
    entries: to learn from, of each text, drawn alike for all heads.
    seed: of that draw, the first weights and the batches.
    """

    def __init__(self, units: int = 32, entries: int = 1024, seed: int = 0) -> None:
        self._units, self._entries = units, entries
        self._draw = torch.Generator().manual_seed(seed)
        self._inputs: list[Tensor] = []  # by text, [layers, kv heads, entries, features]
        self._targets: list[Tensor] = []
        self._linear = self._mean = self._deviation = self._up = self._bias = self._down = torch.empty(0)

    def add(self, text: Entries) -> None:
        """Remember some entries of a text."""
        chosen = torch.randperm(len(text.watched), generator=self._draw)[: self._entries]
        self._inputs.append(torch.stack([rows[:, chosen] for rows in _features(text)]))
        self._targets.append(target_of(text.worth)[:, :, chosen].float())

    def fit(self, linear: Tensor, steps: int = 2000, batch: int = 256, rate: float = 2e-3, decay: float = 0.1) -> None:
        """Learn what the linear map [layers, kv heads, features] leaves over (AdamW, its rate falling to 0)."""
        inputs, targets = torch.cat(self._inputs, 2), torch.cat(self._targets, 2)
        left = (targets - (inputs @ linear.unsqueeze(3)).squeeze(3)).flatten(0, 1)
        self._linear, self._mean = linear, inputs.mean(2, keepdim=True)
        self._deviation = inputs.std(2, keepdim=True).clamp_min(1e-6)
        x = ((inputs - self._mean) / self._deviation).flatten(0, 1)
        pairs, count, features = x.shape
        self._up = torch.randn(pairs, features, self._units, generator=self._draw) / features**0.5
        self._bias, self._down = torch.zeros(pairs, 1, self._units), torch.zeros(pairs, self._units, 1)
        parameters = [p.requires_grad_() for p in (self._up, self._bias, self._down)]
        optimiser = torch.optim.AdamW(parameters, rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            some = torch.randint(count, (batch,), generator=self._draw)
            # Each pair has weights of its own, so the sum over pairs learns each as if it were alone.
            loss = (self._network(x[:, some]) - left[:, some]).square().mean(1).sum()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def predict(self, text: Entries) -> Tensor:
        """The expected target of the watched entries, [layers, kv heads, entries] float32."""
        x = (torch.stack(_features(text)) - self._mean) / self._deviation
        more = self._network(x.flatten(0, 1))
        return predict(self._linear, text) + more.view(x.shape[:3])

    def _network(self, x: Tensor) -> Tensor:
        return (F.gelu(x @ self._up + self._bias) @ self._down).squeeze(2)


def _features(text: Entries) -> list[Tensor]:
    """By layer, [kv heads, watched, features] float32; means over all keys and values, as where entries are rated."""
    watched = slice(text.watched.start, text.watched.stop)
    return [
        torch.cat(RECIPE.features(keys, values), -1)[:, watched].cpu()
        for keys, values in zip(text.keys, text.values, strict=True)
    ]
