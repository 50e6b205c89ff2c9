# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Fits without some of their features are those of the others alone; a hidden layer learns what a line cannot."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from deltamem_vllm.calibration.predictor import Entries, PredictorFit, learn, predict, target_of
from deltamem_vllm.calibration.recipe import RECIPE
from deltamem_vllm.scoring.features import feature_parts, feature_widths

LAYERS, HEADS, ENTRIES, DIM = 2, 3, 200, 8


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("predictor_ablation")


@pytest.mark.parametrize("without", [("keys", "pairs"), ("values",), ("norms",), ()])
def test_weights_without_parts(ablation: ModuleType, without: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(LAYERS, HEADS, ENTRIES, DIM, generator=generator) for _ in range(2))
    peaks = torch.rand(LAYERS, HEADS, ENTRIES, generator=generator)
    fit = PredictorFit()
    for layer in range(LAYERS):
        fit.add(layer, keys[layer], values[layer], peaks[layer], range(ENTRIES))

    widths = feature_widths(DIM, DIM)
    weights = ablation.solve_without(fit.sums(), LAYERS, widths, without)

    gone = {place for part in without for place in ablation.PARTS[part]}
    for layer in range(LAYERS):
        parts = feature_parts(keys[layer], values[layer])
        phi = torch.cat([part for place, part in enumerate(parts) if place not in gone], -1).double()
        for head in range(HEADS):
            products = phi[head].T @ phi[head]
            ridge = RECIPE.ridge * products.diagonal().mean() * torch.eye(len(products))
            expected = torch.linalg.solve(products + ridge, phi[head].T @ target_of(peaks[layer, head]))
            own = weights[layer, head].split(widths)
            assert all(not own[place].any() for place in gone)
            got = torch.cat([part for place, part in enumerate(own) if place not in gone])
            # float64 by another solver, then rounded to float32.
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


def test_every_part_is_of_the_features(ablation: ModuleType) -> None:
    places = [place for part in ablation.PARTS.values() for place in part]
    assert sorted(places) == list(range(1, len(feature_widths(DIM, DIM))))  # all but the constant
    assert {part for parts in ablation.WITHOUT.values() for part in parts} <= set(ablation.PARTS)


def test_a_hidden_layer_learns_what_is_not_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("hidden_layer")
    generator = torch.Generator().manual_seed(5)

    def text() -> Entries:
        keys, values = (torch.randn(LAYERS, HEADS, 600, DIM, generator=generator) for _ in range(2))
        peaks = torch.exp(-3.0 + keys[..., 0] * keys[..., 1]).clamp(max=1.0)[..., 100:]  # no line tells a product
        return Entries(keys, values, peaks, range(100, 600))

    fit, hidden = PredictorFit(), module.HiddenLayer(units=16, entries=400)
    for one in (text(), text(), text()):
        learn(fit, one)
        hidden.add(one)
    linear = fit.solve()
    hidden.fit(linear, steps=600, rate=1e-2)
    unseen = text()
    target = target_of(unseen.worth)

    def explained(prediction: torch.Tensor) -> float:
        left = (target - prediction.double()).square().sum((1, 2))
        return float((1 - left / (target - target.mean((1, 2), keepdim=True)).square().sum((1, 2))).min())

    assert hidden.predict(unseen).shape == target.shape
    assert explained(predict(linear, unseen)) < 0.1
    assert explained(hidden.predict(unseen)) > 0.6
