# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Fits the predictor: a linear map per (layer, kv head) from an entry's key and value to what the entry will be worth.

What it is worth is the most attention it got while its text was used, times how far its value reaches, on a
logarithmic scale: it spans many orders of magnitude, and only its order and its ratios matter. Ridge regression in
closed form: sums over all texts, one system of equations per head, nothing drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.calibration.recipe import RECIPE, Recipe


def target_of(worth: Tensor, recipe: Recipe = RECIPE) -> Tensor:
    """What is predicted of entries that are worth this: the logarithm, float64, same shape."""
    return torch.log(worth.double() + recipe.log_floor)


class PredictorFit:
    """Sums of ridge regression for every (layer, kv head); takes in one layer of one text at a time.

    Memory is ``F * F`` float64 per pair, however many texts there are.

    Parameters
    ----------
    recipe : Recipe
        Features, scale and ridge.
    """

    def __init__(self, recipe: Recipe = RECIPE) -> None:
        self._recipe = recipe
        self._products: dict[int, Tensor] = {}
        self._moments: dict[int, Tensor] = {}

    def add(self, layer: int, keys: Tensor, values: Tensor, worth: Tensor, entries: range) -> None:
        """Learn from one layer of one text.

        Parameters
        ----------
        layer : int
            Its index.
        keys, values : Tensor
            [kv heads, n, D] and [kv heads, n, D_v], any floating point, RoPE applied: all that was in the cache.
        worth : Tensor
            [kv heads, len(entries)], of each of `entries`.
        entries : range
            Which of the n to learn from, step 1.
        """
        phi = _features(keys, values, entries, self._recipe).double()
        target = target_of(worth, self._recipe).to(phi.device)
        products, moments = (phi.mT @ phi).cpu(), (phi.mT @ target.unsqueeze(2)).squeeze(2).cpu()
        if layer in self._products:
            products += self._products[layer]
            moments += self._moments[layer]
        self._products[layer], self._moments[layer] = products, moments

    def solve(self) -> Tensor:
        """The weights, [layers, kv heads, features] float32, in the order of `scoring.features`."""
        return torch.stack([self._solve(layer) for layer in sorted(self._products)])

    def _solve(self, layer: int) -> Tensor:
        products = self._products[layer]
        ridge = self._recipe.ridge * products.diagonal(dim1=1, dim2=2).mean(1)
        damped = products + ridge[:, None, None] * torch.eye(products.shape[1], dtype=products.dtype)
        # Symmetric and positive definite by the ridge.
        factor = torch.linalg.cholesky(damped)
        weights: Tensor = torch.cholesky_solve(self._moments[layer].unsqueeze(2), factor).squeeze(2)
        return weights.float()

    def sums(self) -> dict[str, Tensor]:
        """All that was learned: by name, X'X [kv heads, F, F] and X'y [kv heads, F] of each layer, float64."""
        named = {f"products.{layer}": sums for layer, sums in self._products.items()}
        return {**named, **{f"moments.{layer}": sums for layer, sums in self._moments.items()}}

    def restore(self, sums: Mapping[str, Tensor]) -> None:
        """Go on from what `sums` of another fit with the same recipe gave."""
        for into, prefix in ((self._products, "products."), (self._moments, "moments.")):
            into.clear()
            into.update({int(name.removeprefix(prefix)): t for name, t in sums.items() if name.startswith(prefix)})


@dataclass(frozen=True)
class Entries:
    """What one text left in the cache, and what of it was worth how much.

    Attributes
    ----------
    keys, values : sequence of Tensor
        By layer, [kv heads, n, D] and [kv heads, n, D_v].
    worth : Tensor
        [layers, kv heads, len(watched)] float32: the most attention an entry got, times how far its value reaches.
    watched : range
        The entries that `worth` is of.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    worth: Tensor
    watched: range


def learn(fit: PredictorFit, text: Entries) -> None:
    """Take in all layers of a text."""
    for layer, (keys, values) in enumerate(zip(text.keys, text.values, strict=True)):
        fit.add(layer, keys, values, text.worth[layer], text.watched)


def predict(weights: Tensor, text: Entries, recipe: Recipe = RECIPE) -> Tensor:
    """The expected target of the watched entries, [layers, kv heads, entries] float32 on the CPU."""
    rows = []
    for own, keys, values in zip(weights, text.keys, text.values, strict=True):
        phi = _features(keys, values, text.watched, recipe)
        rows.append((phi @ own.to(phi.device).unsqueeze(2)).squeeze(2).cpu())
    return torch.stack(rows)


def _features(keys: Tensor, values: Tensor, entries: range, recipe: Recipe) -> Tensor:
    """[kv heads, len(entries), features] float32. Means are over all keys and values, as where entries are rated."""
    every = torch.cat(recipe.features(keys, values), -1)
    return every[:, entries.start : entries.stop]
