# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Scorers that learn from a calibration: refused at start without one, given the heads of their rank with one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from deltamem_vllm.calibration.artifact import Calibration, Card
from deltamem_vllm.calibration.fingerprint import Geometry
from deltamem_vllm.config import ConfigError, DeltaMemConfig
from deltamem_vllm.integration import calibrations
from deltamem_vllm.integration.calibrations import bind_scorers, find_calibration, kv_heads_of_rank
from deltamem_vllm.plugin import register
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.features import feature_widths
from deltamem_vllm.scoring.registry import load_scorer

LAYERS, HEADS, DIM = 2, 4, 16
GEOMETRY = Geometry(LAYERS, 8, HEADS, DIM)


def made(predictor: bool = True) -> Calibration:
    gen = torch.Generator().manual_seed(0)
    tensors = {"rank_utility": torch.ones(LAYERS, HEADS, 8)}
    if predictor:
        tensors["predictor"] = torch.randn(LAYERS, HEADS, sum(feature_widths(DIM, DIM)), generator=gen) * 0.05
    return Calibration(Card("some/model", "f" * 64, GEOMETRY), tensors, Path("made"))


def find(monkeypatch: pytest.MonkeyPatch, there: Calibration | None, **fields: Any) -> Calibration | None:
    monkeypatch.setattr(calibrations, "find", lambda *args, **kwargs: there)
    model = SimpleNamespace(model="some/model", revision=None)
    vllm_config = SimpleNamespace(model_config=model, load_config=SimpleNamespace(download_dir=None))
    return find_calibration(vllm_config, DeltaMemConfig(**fields))


@pytest.mark.parametrize("dealing", ["global", "equal"])
@pytest.mark.parametrize(
    "fields", [{"scorer": "predictor"}, {"scorer": "tova", "request_scorers": ["predictor"]}], ids=["own", "requests'"]
)
def test_what_a_scorer_learns_must_be_there(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], dealing: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        find(monkeypatch, None, **fields, dealing=dealing)
    message = str(caught.value)
    assert "scorer 'predictor' needs 'predictor' of a calibration, and with calibration='auto' there is none" in message
    assert "`deltamem calibrate some/model`" in message
    assert message.endswith("other scorers: 'auto', delta, distinct, keydiff, random, snapkv, streaming, tova.")
    with pytest.raises(ConfigError, match="the one in made lacks it"):
        find(monkeypatch, made(predictor=False), **fields, dealing=dealing)
    there = made()
    assert find(monkeypatch, there, **fields, dealing=dealing) is there


def test_other_scorers_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    old = made(predictor=False)
    assert find(monkeypatch, old) is old
    assert find(monkeypatch, None) is None
    # Nothing of it would be used.
    assert find(monkeypatch, old, dealing="equal") is None


def test_an_engine_does_not_start_without_what_its_scorer_learns(tmp_path: Path) -> None:
    register()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    given = {"deltamem": {"scorer": "predictor"}}
    arguments = EngineArgs(
        model=str(tmp_path), skip_tokenizer_init=True, enforce_eager=True, additional_config=given, dtype="float32"
    )
    with pytest.raises(ConfigError, match="scorer 'predictor' needs 'predictor' of a calibration"):
        arguments.create_engine_config()


@pytest.mark.parametrize(
    ("ranks", "heads"),
    [(1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (8, [[0], [0], [1], [1], [2], [2], [3], [3]])],
)
def test_every_rank_rates_with_the_weights_of_its_own_heads(
    monkeypatch: pytest.MonkeyPatch, ranks: int, heads: list[list[int]]
) -> None:
    gen = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(HEADS, 20, DIM, generator=gen) for _ in range(2))
    whole = load_scorer("predictor")
    weights = made().predictor
    assert weights is not None
    whole.bind(weights)
    expected = whole.score(ScoreView(keys, values, None, 1.0, layer=1))
    monkeypatch.setattr(calibrations, "get_tensor_model_parallel_world_size", lambda: ranks)
    for rank, own in enumerate(heads):
        assert kv_heads_of_rank(rank, ranks, HEADS) == own
        monkeypatch.setattr(calibrations, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        scorers = [load_scorer("predictor"), load_scorer("tova")]
        bind_scorers(made(), scorers, LAYERS, len(own), torch.device("cpu"))
        found = scorers[0].score(ScoreView(keys[own], values[own], None, 1.0, layer=1))
        torch.testing.assert_close(found, expected[own])
    with pytest.raises(ConfigError, match="is for 2 layers and 4 kv heads"):
        bind_scorers(made(), scorers, LAYERS + 1, len(own), torch.device("cpu"))
