# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A calibration on disk: whole or not at all, and checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deltamem_vllm.calibration import artifact
from deltamem_vllm.calibration.artifact import CARD, TENSORS, load, save
from deltamem_vllm.calibration.errors import CalibrationError
from tests.support.calibration_models import falling, made_for
from tests.support.tiny_models import HEAD_DIM, KV_HEADS, LAYERS


def test_artifact_comes_back_as_it_was(tmp_path: Path) -> None:
    made = made_for()
    save(made, tmp_path / "a" / "b")
    # A server may run as another user.
    assert len({path.stat().st_mode for path in (tmp_path / "a" / "b").iterdir()}) == 1
    back = load(tmp_path / "a" / "b")
    assert back.card == made.card
    assert back.folder == tmp_path / "a" / "b"
    assert torch.equal(back.rank_utility, made.rank_utility)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    # A list of numbers is one line of the card.
    assert '"layers": [ 0.5, 0.25, 0.75 ]' in (back.folder / CARD).read_text()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.zeros(LAYERS, KV_HEADS, 85).double(), "dtype torch.float64, expected torch.float32"),
        (torch.zeros(LAYERS, KV_HEADS, 84), r"shape \(3, 2, 84\), expected \(3, 2, 85\)"),
        (torch.full((LAYERS, KV_HEADS, 85), torch.inf), "not finite"),
    ],
)
def test_a_predictor_is_checked_where_there_is_one(tmp_path: Path, weights: Tensor, message: str) -> None:
    made = made_for()
    assert made.predictor is None
    with pytest.raises(CalibrationError, match=f"predictor of the calibration has .*{message}"):
        save(replace(made, tensors={**made.tensors, "predictor": weights}), tmp_path / "never")
    right = torch.ones(LAYERS, KV_HEADS, 1 + HEAD_DIM + HEAD_DIM // 2 + HEAD_DIM + 4)
    save(replace(made, tensors={**made.tensors, "predictor": right}), tmp_path / "made")
    back = load(tmp_path / "made").predictor
    assert back is not None and torch.equal(back, right)


def test_a_predictor_with_other_features_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = made_for()
    save(made, tmp_path / "made")
    tensors = {**made.tensors, "predictor": torch.ones(LAYERS, KV_HEADS, 7)}
    save_file(tensors, tmp_path / "made" / TENSORS)
    card_with(tensors_sha256=artifact.sha256_of(tmp_path / "made" / TENSORS))(tmp_path / "made")
    back = load(tmp_path / "made")
    assert back.predictor is None and torch.equal(back.rank_utility, made.rank_utility)
    assert "it has 7 features, predictors of this deltamem have 85; make a new one: deltamem calibrate" in caplog.text


def test_later_tensors_are_no_obstacle(tmp_path: Path) -> None:
    made = made_for()
    save(replace(made, tensors={**made.tensors, "predictor.0": torch.ones(3)}), tmp_path / "new")
    assert load(tmp_path / "new").tensors["predictor.0"].tolist() == [1, 1, 1]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    save(made_for("1"), tmp_path / "made")
    with pytest.raises(CalibrationError, match="holds a calibration already; --force replaces it"):
        save(made_for("2"), tmp_path / "made")
    assert load(tmp_path / "made").card.fingerprint == "1"
    save(made_for("2"), tmp_path / "made", force=True)
    assert load(tmp_path / "made").card.fingerprint == "2"
    (tmp_path / "made" / "notes.txt").write_text("mine")
    with pytest.raises(CalibrationError, match=r"holds other files \(notes.txt\)"):
        save(made_for("3"), tmp_path / "made", force=True)
    with pytest.raises(CalibrationError, match="is a file"):
        save(made_for(), tmp_path / "made" / "notes.txt")


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> str:
        raise OSError("disk full")

    save(made_for("1"), tmp_path / "made")
    monkeypatch.setattr(artifact, "_card_text", full)
    with pytest.raises(OSError, match="disk full"):
        save(made_for("2"), tmp_path / "made", force=True)
    assert load(tmp_path / "made").card.fingerprint == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def card_with(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps({**card, **fields}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CARD).unlink(), "has no card.json"),
        (lambda folder: (folder / CARD).write_text("{"), "card.json cannot be read"),
        (lambda folder: (folder / CARD).write_text("[]"), "not a JSON object"),
        (card_with(format_version=2), "has format_version 2, this deltamem reads 1"),
        (card_with(geometry={"layers": 3}), "states no usable model, fingerprint or geometry"),
        (card_with(geometry=None), "states no usable model, fingerprint or geometry"),
        (card_with(tensors_sha256="0"), "its card says 0"),
        (lambda folder: (folder / TENSORS).unlink(), "calibration.safetensors is missing"),
        (lambda folder: (folder / TENSORS).write_bytes(b"x"), "one of the two changed"),
    ],
)
def test_damage_is_said(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    save(made_for(), tmp_path / "made")
    damage(tmp_path / "made")
    with pytest.raises(CalibrationError, match=message) as caught:
        load(tmp_path / "made")
    assert "deltamem calibrate" in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (None, "has no tensor rank_utility"),
        (falling(LAYERS, KV_HEADS, 16).double(), "dtype torch.float64, expected torch.float32"),
        (falling(LAYERS, KV_HEADS + 1, 16), r"shape \(3, 3, 16\), expected \(3, 2, quantiles\)"),
        (falling(LAYERS, KV_HEADS), "shape"),
        (falling(LAYERS, KV_HEADS, 16) * torch.nan, "not finite"),
        (falling(LAYERS, KV_HEADS, 16) - 1, "below zero"),
        (falling(LAYERS, KV_HEADS, 16).flip(-1), "above the one before"),
    ],
)
def test_tensors_are_checked_both_ways(tmp_path: Path, profile: Tensor | None, message: str) -> None:
    wrong = {"other": torch.ones(1)} if profile is None else {"rank_utility": profile}
    with pytest.raises(CalibrationError, match=message):
        save(replace(made_for(), tensors=wrong), tmp_path / "never")
    assert not (tmp_path / "never").exists()
    save(made_for(), tmp_path / "made")
    save_file(wrong, tmp_path / "made" / TENSORS)
    card_with(tensors_sha256=artifact.sha256_of(tmp_path / "made" / TENSORS))(tmp_path / "made")
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / "made")
