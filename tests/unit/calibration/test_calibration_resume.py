# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""An interrupted calibration goes on where it was, and only with what it was begun with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from deltamem_vllm.calibration import unfinished
from deltamem_vllm.calibration.artifact import load
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.options import Options
from deltamem_vllm.calibration.run import calibrate
from deltamem_vllm.cli.main import app
from tests.support.calibration_models import calibration_model

OPTIONS = Options(samples=3, tokens=80, kinds=("novel", "log"))
ALL = 5


class Interrupt:
    """Stops a calibration, as Ctrl-C does, when it has told of so many texts."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        if f"text {self.after} of" in line:
            raise KeyboardInterrupt


def texts_of(lines: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith("text ")]


@pytest.mark.parametrize("after", range(1, ALL + 1))
def test_it_goes_on_where_it_was_and_comes_to_the_same(tiny: Callable[[str], Path], tmp_path: Path, after: int) -> None:
    model = str(tiny("llama"))
    whole = calibrate(model, tmp_path / "whole", OPTIONS)
    first = Interrupt(after)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path / "made", OPTIONS, report=first)
    assert texts_of(first.lines) == list(range(1, after + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.unfinished", "whole"]
    again: list[str] = []
    made = calibrate(model, tmp_path / "made", OPTIONS, report=again.append)
    assert texts_of(again) == list(range(after + 1, ALL + 1))
    assert f"going on after {after} of {ALL} texts" in again
    for name, tensor in whole.tensors.items():
        assert torch.equal(made.tensors[name], tensor)
    for name in ("texts", "held_out_texts", "metrics", "shares"):
        assert made.card.details[name] == whole.card.details[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "whole"]
    assert torch.equal(load(tmp_path / "made").rank_utility, whole.rank_utility)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tokens": 81}, "tokens was 80, is 81"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"target": "answers"}, 'target was "both", is "answers"'),
        ({"samples": 4}, "samples was 3, is 4"),
        ({"kinds": ("novel", "code")}, r'kinds was \["novel", "log"\], is \["novel", "code"\]'),
    ],
)
def test_other_options_do_not_go_on(
    tiny: Callable[[str], Path], tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    model, other = str(tiny("llama")), replace(OPTIONS, **fields)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path / "made", OPTIONS, report=Interrupt(2))
    with pytest.raises(
        CalibrationError, match=f"holds an interrupted calibration, but .*{told}.*--restart begins anew"
    ):
        calibrate(model, tmp_path / "made", other)
    lines: list[str] = []
    made = calibrate(model, tmp_path / "made", other, restart=True, report=lines.append)
    assert texts_of(lines)[0] == 1
    assert made.card.details["options"] == other.as_json()
    assert not (tmp_path / "made.unfinished").exists()


def test_another_model_does_not_go_on(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(str(tiny("llama")), tmp_path / "made", OPTIONS, report=Interrupt(1))
    with pytest.raises(CalibrationError, match="but fingerprint was "):
        calibrate(str(calibration_model("qwen2", tmp_path)), tmp_path / "made", OPTIONS)


def test_other_texts_and_features_do_not_go_on(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    # As after an update of deltamem.
    with pytest.raises(KeyboardInterrupt):
        calibrate(str(tiny("llama")), tmp_path / "made", OPTIONS, report=Interrupt(1))
    file = tmp_path / "made.unfinished" / "state.safetensors"
    with safe_open(file, "pt") as state:
        header = json.loads(state.metadata()["deltamem"])
        tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118 (no mapping)
    header["identity"]["corpus"] = "0" * 64
    header["identity"]["recipe"]["features_sha256"] = "0" * 64
    save_file(tensors, file, {"deltamem": json.dumps(header)})
    with pytest.raises(CalibrationError, match="but corpus was .*, recipe was .*--restart"):
        calibrate(str(tiny("llama")), tmp_path / "made", OPTIONS)


def test_a_damaged_state_is_said(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        calibrate(str(tiny("llama")), tmp_path / "made", OPTIONS, report=Interrupt(1))
    (tmp_path / "made.unfinished" / "state.safetensors").write_bytes(b"x")
    with pytest.raises(CalibrationError, match="of an interrupted calibration, cannot be read.*--restart begins anew"):
        calibrate(str(tiny("llama")), tmp_path / "made", OPTIONS)


def test_a_full_disk_costs_one_text_at_most(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = Path.replace
    count = 0

    def full(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError("disk full")
        return replaced(self, target)

    monkeypatch.setattr(unfinished.Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        calibrate(str(tiny("llama")), tmp_path / "made", OPTIONS)
    lines: list[str] = []
    calibrate(str(tiny("llama")), tmp_path / "made", OPTIONS, report=lines.append)
    assert texts_of(lines) == [3, 4, 5]


def test_the_command_says_how_to_go_on(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["calibrate", str(tiny("llama")), "--out", str(tmp_path / "made"), "--samples", "2", "--kinds", "log"]
    with pytest.raises(KeyboardInterrupt):
        options = Options(samples=2, tokens=60, kinds=("log",))
        calibrate(str(tiny("llama")), tmp_path / "made", options, report=Interrupt(1))
    wrong = CliRunner().invoke(app, [*arguments, "--tokens", "61"])
    assert wrong.exit_code == 1 and "--restart begins anew" in wrong.stderr
    done = CliRunner().invoke(app, [*arguments, "--tokens", "60"])
    assert done.exit_code == 0 and "going on after 1 of 3 texts" in done.stderr
