# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""KVzip as the evaluation's reference: the second pass, and what becomes of its scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deltamem_vllm.calibration.attention import attend_and_peak
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.evaluation.eval import kvzip_attention
from deltamem_vllm.evaluation.eval.encode import Encoder
from deltamem_vllm.evaluation.eval.kvzip import KVzipScorer, Rater, message_of, shared_prefix
from deltamem_vllm.evaluation.eval.kvzip_attention import WatchedAttention
from deltamem_vllm.evaluation.tasks import make_sample
from deltamem_vllm.integration.eval_kvzip import KVzipReference
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.registry import scorer_names

HEADS, KV_HEADS, DIM, ENTRIES = 6, 2, 16, 70


# ---- attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 500, 1 << 20])
def test_attention_is_that_of_the_calibration_whatever_the_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvzip_attention, "_PIECE_ELEMENTS", piece)
    generator = torch.Generator().manual_seed(1)
    attention = WatchedAttention()
    attention.watch(ENTRIES)
    expected = torch.zeros(2, KV_HEADS, ENTRIES)
    for layer in (1, 0, 1, 0):  # what is asked twice is remembered, and buffers are used again
        query = torch.randn(1, HEADS, 23, DIM, generator=generator)
        key, value = (torch.randn(1, KV_HEADS, 100, DIM, generator=generator) for _ in range(2))
        out, _ = attention.attend(SimpleNamespace(layer_idx=layer), query, key, value, None, scaling=0.3)
        wanted, peak = attend_and_peak(query[0], key[0], value[0], 0.3, range(ENTRIES))
        assert torch.allclose(out[0].transpose(0, 1), wanted, atol=1e-6)
        expected[layer] = torch.maximum(expected[layer], peak)
    assert torch.allclose(attention.peaks(), expected, atol=1e-6)


def test_attention_other_than_causal_is_refused() -> None:
    query, key = torch.randn(1, HEADS, 3, DIM), torch.randn(1, KV_HEADS, 5, DIM)
    attention = WatchedAttention()
    with pytest.raises(CalibrationError, match="sliding_window; supported: plain causal"):
        attention.attend(torch.nn.Identity(), query, key, key, None, sliding_window=4)
    with pytest.raises(CalibrationError, match="a mask or batch of its own"):
        attention.attend(torch.nn.Identity(), query, key, key, torch.zeros(3, 5))


# ---- what is repeated -------------------------------------------------------------------------------------


def test_a_model_that_attends_elsewhere_is_refused() -> None:
    attention = WatchedAttention()
    attention.watch(3)
    with pytest.raises(CalibrationError, match="leave kvzip out of"):
        attention.peaks()


def test_the_message_is_what_the_template_surrounds() -> None:
    before, after = [1, 2], [8, 9]
    assert message_of((1, 2, 5, 6, 8, 9), before, after) == range(2, 4)
    assert message_of((1, 2, 5, 6), before, after) == range(2, 4)
    assert message_of((5, 6, 8, 9), before, after) == range(4)
    assert message_of((5, 6), [], []) == range(2)


def test_prompts_share_what_they_begin_with() -> None:
    assert shared_prefix((1, 2, 3), (1, 2, 4, 5)) == 2
    assert shared_prefix((1, 2), (1, 2, 4)) == 2
    assert shared_prefix((), (1,)) == 0


@pytest.fixture(scope="module")
def prompts(smollm2_path: str) -> dict[str, tuple[int, ...]]:
    from transformers import AutoTokenizer

    encoder = Encoder(AutoTokenizer.from_pretrained(smollm2_path))
    sample = make_sample("niah-text", 0, seed=2, length=300, count_tokens=encoder.count)
    return {
        "agnostic": encoder.encode(sample, "agnostic").prompt,
        "aware": encoder.encode(sample, "aware").prompt,
    }


def test_the_second_pass_looks_at_what_it_repeats(smollm2_path: str, prompts: dict[str, tuple[int, ...]]) -> None:
    rater = Rater(smollm2_path, "cpu", keep=2)
    aware = rater.rate(prompts["aware"])
    assert aware.shape == (30, 3, len(prompts["aware"]))
    assert bool((aware >= 0).all()) and bool((aware <= 1).all())
    # The model copies by looking a token up: some head rests on nearly every token of the text.
    copied = aware.amax((0, 1))[30:]
    assert float((copied > 0.5).float().mean()) > 0.9
    # And most heads have no use for most of it.
    assert float(aware.median()) < 0.1
    again = Rater(smollm2_path, "cpu", keep=2)
    agnostic = again.rate(prompts["agnostic"])
    assert agnostic.shape[2] == len(prompts["agnostic"])
    # Beginning from the other prompt's first pass changes nothing but the rounding of bfloat16.
    assert float((rater.rate(prompts["agnostic"]) - agnostic).abs().mean()) < 2e-3
    assert torch.equal(rater.rate(prompts["aware"]), aware)
    assert len(rater._read) == 1 and len(rater._known) == 2


# ---- what becomes of the scores ---------------------------------------------------------------------------


def view(layer: int, first_head: int, heads: int, entries: int) -> ScoreView:
    keys = torch.zeros(heads, entries, 4)
    return ScoreView(keys, keys, None, 0.5, layer, 0, first_head)


def test_the_scorer_gives_back_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(2, 3, 10)
    with pytest.raises(ValueError, match="rates nothing by itself"):
        KVzipScorer().score(view(0, 0, 3, 10))
    monkeypatch.setattr(KVzipScorer, "scores", scores)
    assert torch.equal(KVzipScorer().score(view(1, 0, 3, 10)), scores[1])
    assert torch.equal(KVzipScorer().score(view(1, 2, 1, 10)), scores[1, 2:])
    with pytest.raises(ValueError, match=r"a prompt of 10 tokens, but 12 entries .* raise the grid's policy.interval"):
        KVzipScorer().score(view(1, 0, 3, 12))


def test_no_server_has_it() -> None:
    import subprocess
    import sys

    listed = "from deltamem_vllm.scoring.registry import scorer_names; print('kvzip' in scorer_names())"
    done = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Compactor:
    """Records which scores a compaction finds."""

    def __init__(self) -> None:
        self.found: list[Tensor | None] = []
        self.fail = False

    def run(self, plan: Any) -> None:
        self.found.append(KVzipScorer.scores)
        if self.fail:
            raise RuntimeError("no memory")


def test_each_compaction_finds_its_own_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    compactor = Compactor()
    reference = KVzipReference(SimpleNamespace(deltamem=SimpleNamespace(compactor=compactor)), "model", "cpu", 4)
    reference._rater = SimpleNamespace(rate=lambda prompt: torch.full((1, 1, len(prompt)), float(prompt[0])))  # type: ignore[assignment]
    reference.prepare("a", [3, 4])
    reference.prepare("b", [5, 6, 7])
    for request, scorer in (("b", "kvzip"), ("a", "kvzip"), ("a", "tova")):
        compactor.run(SimpleNamespace(scorer=scorer, request_id=request, dealing="global"))
    b, a, none = compactor.found
    assert b is not None and b.tolist() == [[[5.0] * 3]]
    assert a is not None and a.tolist() == [[[3.0] * 2]]
    assert none is None
    compactor.fail = True
    with pytest.raises(RuntimeError, match="no memory"):
        compactor.run(SimpleNamespace(scorer="kvzip", request_id="a", dealing="global"))
    assert KVzipScorer.scores is None
    reference.forget("a")
    with pytest.raises(KeyError):
        compactor.run(SimpleNamespace(scorer="kvzip", request_id="a", dealing="global"))
    assert "kvzip" not in scorer_names()
