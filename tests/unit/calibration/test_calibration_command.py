# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The command: what it makes, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from deltamem_vllm.calibration.artifact import Calibration, find
from deltamem_vllm.calibration.corpus import FAMILIES as FAMILIES_OF_TEXT
from deltamem_vllm.calibration.corpus import KINDS
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import fingerprint
from deltamem_vllm.calibration.options import Options
from deltamem_vllm.calibration.run import calibrate
from deltamem_vllm.cli.main import app
from tests.support.calibration_models import GEOMETRY, edit_config
from tests.support.tiny_models import FAMILIES, KV_HEADS, LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_command_makes_what_a_server_finds(tiny: Callable[[str], Path], family: str, cache: Path) -> None:
    model = tiny(family)
    arguments = ["calibrate", str(model), "--samples", "2", "--tokens", "150", "--target", "both", "--seed", "3"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    assert "layer" in done.stdout and "best 25%" in done.stdout
    assert "Spearman" in done.stdout and "records" in done.stdout
    lines = done.stderr.splitlines()
    assert [line for line in lines if "text 1 of 8 (novel): " in line and " repeated" in line and " left" in line]
    assert [line for line in lines if "text 8 of 8 (" in line and "held out" in line and "; 0 s left" in line]
    found = find("auto", model)
    assert found is not None and found.folder == cache / "calibrations" / fingerprint(model)
    assert found.card.geometry == GEOMETRY
    assert found.rank_utility.shape == (LAYERS, KV_HEADS, 128)
    assert found.predictor is not None and found.predictor.isfinite().all()
    details = found.card.details
    assert found.card.model == model.name
    assert [(text["kind"], text["seed"]) for text in details["texts"]] == [("novel", 30_000), ("table", 30_001)]
    texts = [*details["texts"], *details["held_out_texts"]]
    assert [text["tokens"] for text in texts] == [150] * 8
    assert len({text["sha256"] for text in texts}) == 8
    options = {"samples": 2, "tokens": 150, "kinds": list(KINDS), "target": "both", "seed": 3}
    assert details["options"] == options
    assert 0 <= details["metrics"]["repeat_accuracy"] <= 1 and 0 <= details["metrics"]["answer_accuracy"] <= 1
    assert set(details["metrics"]["predictor_held_out_by_family"]) == set(FAMILIES_OF_TEXT)
    assert set(details["metrics"]["predictor_held_out"]["kept"]) == {"0.25", "0.1"}
    assert details["pass"]["chat_template"] == (family != "mistral")
    assert set(details["shares"]) == {"0.5", "0.25", "0.1", "0.05"}
    for ratio, share in details["shares"].items():
        heads = torch.tensor(share["heads"])
        assert heads.shape == (LAYERS, KV_HEADS)
        torch.testing.assert_close(heads.mean(-1), torch.tensor(share["layers"]), atol=2e-3, rtol=0)
        assert abs(heads.mean().item() - float(ratio)) < 0.01
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "--force replaces it" in again.stderr
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0


def test_command_writes_where_it_is_told(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "made"
    arguments = ["calibrate", str(model), "--samples", "1", "--tokens", "64", "--kinds", "log, code"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.stderr
    found = find(str(out), model)
    assert found is not None
    assert [text["kind"] for text in found.card.details["texts"]] == ["log"]
    assert [text["kind"] for text in found.card.details["held_out_texts"]] == ["log", "code"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("target", ["repeat", "answers"])
def test_same_seeds_same_weights(tiny: Callable[[str], Path], tmp_path: Path, target: str) -> None:
    def made(name: str, **options: Any) -> Calibration:
        chosen = Options(**{"samples": 2, "tokens": 250, "kinds": ("list",), "target": target, **options})
        return calibrate(str(tiny("llama")), tmp_path / name, chosen)

    one, again, other = made("one"), made("again"), made("other", seed=1)
    for name in ("predictor", "rank_utility"):
        assert torch.equal(one.tensors[name], again.tensors[name])
        assert not torch.equal(one.tensors[name], other.tensors[name])
    differing = {name for name, value in one.card.details.items() if value != again.card.details[name]}
    assert differing <= {"created", "duration_s", "cpu_s"}
    assert ("repeat_accuracy" in one.card.details["metrics"]) == (target == "repeat")
    assert ("answer_accuracy" in one.card.details["metrics"]) == (target == "answers")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layers of type sliding_attention"),
        ({"attention_chunk_size": 64}, "attention_chunk_size=64"),
        ({"kv_lora_rank": 8}, "multi-head latent attention"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"num_kv_shared_layers": 1}, "layers that share KV"),
        ({"alibi": True}, "ALiBi"),
    ],
)
def test_what_a_server_refuses_is_not_calibrated(llama: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(llama, **fields)
    with pytest.raises(CalibrationError, match=f"{message}.*full attention in every layer"):
        calibrate(str(llama), options=Options(samples=1, tokens=64))


def test_sliding_window_is_not_calibrated(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny("mistral"), tmp_path / "mistral"))
    edit_config(model, sliding_window=64)
    with pytest.raises(CalibrationError, match=r"sliding-window attention \(sliding_window=64\)"):
        calibrate(str(model), options=Options(samples=1, tokens=64))


def test_command_says_what_is_missing(llama: Path, tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["calibrate", *arguments])
        assert done.exit_code == 1
        return done.stderr

    assert "is no folder with a config.json" in error(str(tmp_path / "nowhere"))
    assert "cannot be downloaded" in error("org/deltamem-test-no-such-model")
    # 4096 positions: the text and a part of it again do not fit.
    assert "needs" in (text := error(str(llama), "--tokens", "4000")) and "the model has 4096" in text
    for file in llama.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in error(str(llama))
    edit_config(llama, model_type="unheard-of")
    assert "transformers cannot read the configuration" in error(str(llama))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "got 0 samples of 2048 tokens and seed 0; samples and tokens must be at least 1"),
        ({"tokens": 0}, "at least 1"),
        ({"seed": -1}, "the seed at least 0"),
        ({"target": "use"}, "unknown target 'use'; there are repeat, answers, both"),
        ({"kinds": ("log", "poem")}, "unknown kinds of text poem; there are novel, table"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Options(**options)
