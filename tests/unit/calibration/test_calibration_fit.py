# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What is fitted to the attention: the head profile and the predictor, and how well they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltamem_vllm.calibration.attention import NAME, Recorder
from deltamem_vllm.calibration.corpus import draw
from deltamem_vllm.calibration.metrics import held_out_metrics, mean_metrics, rank_correlation
from deltamem_vllm.calibration.predictor import Entries, PredictorFit, learn, predict
from deltamem_vllm.calibration.profile import rank_profile, shares
from deltamem_vllm.calibration.prompt import prompt_of
from deltamem_vllm.calibration.reading import SINKS
from deltamem_vllm.calibration.recipe import RECIPE, Recipe
from deltamem_vllm.calibration.targets import observe
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.features import feature_parts
from deltamem_vllm.scoring.registry import load_scorer
from tests.support.tiny_models import FAMILIES, KV_HEADS, LAYERS


@pytest.mark.parametrize("count", [8, 16, 50, 1000])
def test_profile_is_the_mean_of_ranked_entries_in_equal_bins(count: int) -> None:
    peaks = torch.rand(2, 3, count, generator=torch.Generator().manual_seed(1))
    profile = rank_profile(peaks, 16)
    # Each entry as 16 equal pieces: then bins have whole numbers of them.
    pieces = peaks.sort(-1, descending=True).values.repeat_interleave(16, -1)
    torch.testing.assert_close(profile, pieces.unflatten(-1, (16, count)).mean(-1))
    assert (profile.diff(dim=-1) <= 0).all()


def test_shares_follow_the_best_bins_of_all_pairs() -> None:
    profile = torch.tensor([[[9.0, 8, 7, 6], [5, 1, 0, 0]], [[4, 3, 0, 0], [0, 0, 0, 0]]])
    assert shares(profile, 0.5).tolist() == [[1.0, 0.5], [0.5, 0.0]]
    assert shares(profile, 0.25).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    # Among equals the earlier ones.
    assert shares(torch.zeros(1, 2, 4), 0.5).tolist() == [[1.0, 0.0]]


def text_of(seed: int, layers: int = 3, heads: int = 2, dim: int = 8, count: int = 200) -> Entries:
    """Entries whose attention follows from key and value in every head differently, but for a little noise."""
    gen = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(layers, heads, count, dim, generator=gen) for _ in range(2))
    maps = torch.randn(layers, heads, 2 * dim, generator=torch.Generator().manual_seed(99))
    logs = (torch.cat([keys, values], -1) @ maps.unsqueeze(3)).squeeze(3) * 0.3 - 4
    logs += 0.1 * torch.randn(logs.shape, generator=gen)
    watched = range(7, count - 3)
    return Entries(list(keys), list(values), logs.exp().clamp(max=1)[..., watched.start : watched.stop], watched)


def by_least_squares(texts: list[Entries], layer: int, head: int) -> Tensor:
    """Ridge regression as least squares with a row for each damped weight."""
    rows, targets = [], []
    for text in texts:
        phi = torch.cat(feature_parts(text.keys[layer], text.values[layer]), -1)[head]
        rows.append(phi[text.watched.start : text.watched.stop].double())
        targets.append((text.worth[layer, head].double() + 1e-3).log())
    x, y = torch.cat(rows), torch.cat(targets)
    damping = (1e-4 * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    bottom = torch.zeros(x.shape[1], 1, dtype=x.dtype)
    return torch.linalg.lstsq(torch.cat([x, damping]), torch.cat([y.unsqueeze(1), bottom])).solution.squeeze(1)


def test_fit_is_ridge_regression_over_all_texts() -> None:
    texts = [text_of(0), text_of(1, count=90), text_of(2)]
    fit = PredictorFit()
    for text in texts:
        learn(fit, text)
    weights = fit.solve()
    assert weights.shape == (3, 2, 1 + 8 + 4 + 8 + 4) and weights.dtype == torch.float32
    for layer in range(3):
        for head in range(2):
            expected = by_least_squares(texts, layer, head)
            torch.testing.assert_close(weights[layer, head].double(), expected, atol=1e-5, rtol=1e-4)


def test_a_fit_goes_on_from_its_sums() -> None:
    texts = [text_of(0), text_of(1, count=90), text_of(2)]
    whole, first = PredictorFit(), PredictorFit()
    for text in texts:
        learn(whole, text)
    learn(first, texts[0])
    second = PredictorFit()
    second.restore({name: sums.clone() for name, sums in first.sums().items()})
    for text in texts[1:]:
        learn(second, text)
    assert torch.equal(second.solve(), whole.solve())
    assert {name: sums.dtype for name, sums in second.sums().items()} == {
        f"{kind}.{layer}": torch.float64 for kind in ("products", "moments") for layer in range(3)
    }


def test_features_scale_and_ridge_are_the_recipes() -> None:
    def norms(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        return torch.ones_like(keys[..., :1]), keys.norm(dim=-1, keepdim=True)

    text, recipe = text_of(0), Recipe(norms, log_floor=0.1, ridge=0.5)
    fit = PredictorFit(recipe)
    learn(fit, text)
    weights = fit.solve()
    assert weights.shape == (3, 2, 2)
    x = torch.cat(norms(text.keys[1], text.values[1]), -1)[0, text.watched.start : text.watched.stop].double()
    y = (text.worth[1, 0].double() + 0.1).log()
    damping = 0.5 * x.square().sum(0).mean() * torch.eye(2)
    torch.testing.assert_close(
        weights[1, 0].double(), torch.linalg.solve(x.T @ x + damping, x.T @ y), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(predict(weights, text, recipe)[1, 0].double(), x @ weights[1, 0].double())
    assert recipe.identity() != RECIPE.identity() == Recipe().identity()


@pytest.mark.parametrize("family", FAMILIES)
def test_predictor_of_a_model_is_fitted_to_what_its_cache_held(tiny: Callable[[str], Path], family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    recorder = Recorder()
    recorder.register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME).eval()
    prompt = prompt_of(tokenizer)
    fit, texts = PredictorFit(), []
    for sample in draw(tokenizer, 2, 150):
        texts.append(observe(model, tokenizer, recorder, prompt, sample).entries("both"))
        learn(fit, texts[-1])
    whole = torch.tensor([[*prompt.before, *sample.tokens]])
    assert texts[-1].watched == range(max(SINKS, len(prompt.before)), whole.shape[1])
    with torch.inference_mode():
        cache = AutoModelForCausalLM.from_pretrained(folder).eval()(whole, use_cache=True).past_key_values
    for layer in range(LAYERS):
        torch.testing.assert_close(texts[-1].keys[layer], cache.layers[layer].keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(texts[-1].values[layer], cache.layers[layer].values[0], atol=1e-4, rtol=1e-4)
    weights = fit.solve()
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            expected = by_least_squares(texts, layer, head)
            torch.testing.assert_close(weights[layer, head].double(), expected, atol=1e-3, rtol=1e-3)
    # What the server's scorer makes of them is the fit's own prediction.
    scorer = load_scorer("predictor")
    scorer.bind(weights)
    for layer, row in enumerate(predict(weights, texts[0])):
        view = ScoreView(texts[0].keys[layer], texts[0].values[layer], None, 1.0, layer)
        rated = scorer.score(view)[:, texts[0].watched.start : texts[0].watched.stop]
        torch.testing.assert_close(rated, row.exp(), atol=1e-6, rtol=1e-3)


def test_metrics_of_a_text_not_seen() -> None:
    fit = PredictorFit()
    for seed in range(8):
        learn(fit, text_of(seed))
    text = text_of(100)
    profile = rank_profile(text.worth)
    found = held_out_metrics(fit.solve(), profile, text)
    assert found["r2"] > 0.9 and found["r2_within_heads"] > 0.9 and found["spearman"] > 0.9
    for ratio, kept in found["kept"].items():
        assert float(ratio) * 0.8 < kept["random"] < kept["predictor"] <= kept["oracle"] <= 1
    learned_nothing = held_out_metrics(torch.zeros_like(fit.solve()), profile, text)
    assert learned_nothing["r2"] < 0 and learned_nothing["spearman"] is None


def test_the_mean_of_metrics_leaves_out_what_could_not_be_measured() -> None:
    one = {"r2": 0.5, "spearman": None, "kept": {"0.1": {"oracle": 0.2}}}
    other = {"r2": 0.7, "spearman": 0.4, "kept": {"0.1": {"oracle": 0.4}}}
    assert mean_metrics([one, other]) == {"r2": 0.6, "spearman": 0.4, "kept": {"0.1": {"oracle": 0.3}}}
    assert mean_metrics([one])["spearman"] is None


def test_rank_correlation_is_the_correlation_of_mean_ranks() -> None:
    one = torch.tensor([[1.0, 2, 2, 4], [1, 2, 3, 4], [5, 5, 5, 5]])
    other = torch.tensor([[1.0, 3, 2, 9], [8, 4, 2, 1], [1, 2, 3, 4]])
    found = rank_correlation(one, other)
    ranks = torch.tensor([[1.0, 2.5, 2.5, 4], [1, 3, 2, 4]])
    torch.testing.assert_close(found[0].float(), torch.corrcoef(ranks)[0, 1])
    torch.testing.assert_close(found[1].item(), -1.0)
    assert found[2].isnan()
