# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The configuration model and the supported range of vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from deltamem_vllm.config import ConfigError, DeltaMemConfig, check_fields, field_help, is_active
from deltamem_vllm.versions import SUPPORTED_VLLM, UnsupportedVLLM, check_vllm_version


def test_defaults_survive_a_round_trip_through_json() -> None:
    config = DeltaMemConfig.from_dict({})
    again = json.loads(json.dumps(config.to_json_dict()))
    assert set(again) == set(DeltaMemConfig.model_fields)
    assert DeltaMemConfig.from_dict(again) == config


def test_presence_of_the_key_turns_the_policy_on() -> None:
    assert is_active({"deltamem": {}})
    assert not is_active({"other": 1})
    assert not is_active(None)
    assert DeltaMemConfig.from_additional_config({"deltamem": {"keep_ratio": 1}, "other": 1}).keep_ratio == 1
    with pytest.raises(ConfigError, match="--kv-cache-policy deltamem"):
        DeltaMemConfig.from_additional_config({"other": 1})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"keep_ration": 0.1},
            ["'keep_ration'", "did you mean 'keep_ratio'", "valid keys: mode, keep_ratio"],
        ),
        ({"keep_ratio": 0}, ["keep_ratio: got 0", "> 0 and <= 1", "default 0.1"]),
        ({"keep_ratio": 1.5}, ["got 1.5", "> 0 and <= 1"]),
        ({"keep_ratio": float("nan")}, ["got nan", "> 0 and <= 1"]),
        ({"keep_ratio": "0.1"}, ["got '0.1'", "float"]),
        ({"window": True}, ["got True", "int, >= 1 and <= 256"]),
        ({"window": 257, "recent_tokens": 300}, ["window: got 257", "<= 256"]),
        ({"interval": 0}, ["interval: got 0", ">= 1"]),
        ({"min_tokens": 1.5}, ["min_tokens: got 1.5", "int, >= 0"]),
        ({"mode": "never"}, ["mode: got 'never'", "one of 'pressure', 'always'", "default 'pressure'"]),
        ({"dealing": None}, ["dealing: got None", "one of 'global', 'profile', 'equal'"]),
        ({"keep_tokens": 0}, ["keep_tokens: got 0", "int or null, >= 1", "default null"]),
        ({"keep_tokens": 2.5}, ["keep_tokens: got 2.5", "int or null, >= 1"]),
        ({"coverage": 99}, ["coverage: got 99", "float or null, > 0 and <= 1"]),
        ({"max_keep_ratio": 0}, ["max_keep_ratio: got 0", "> 0 and <= 1"]),
        ({"redundancy": -0.1}, ["redundancy: got -0.1", ">= 0 and <= 1"]),
        ({"calibration": ""}, ["calibration: got ''", "'auto', 'none' or a path"]),
        ({"request_scorers": "tova"}, ["request_scorers: got 'tova'", "list[str], installed scorers"]),
        ({"high_watermark": 1.1}, ["high_watermark: got 1.1", "> 0 and <= 1"]),
        ({"low_watermark": 1}, ["low_watermark: got 1", "> 0 and < 1"]),
        ({"low_watermark": 0.95}, ["low_watermark=0.95 is not below high_watermark=0.95", "raise high_watermark"]),
        (
            {"coverage": 0.99, "keep_ratio": 0.5, "max_keep_ratio": 0.25},
            ["keep_ratio=0.5 is larger than max_keep_ratio=0.25", "at most 0.25"],
        ),
        ({"coverage": 0.99, "dealing": "equal"}, ["coverage=0.99", "dealing='equal'", "leave coverage out"]),
        (
            {"dealing": "profile", "calibration": "none"},
            ["dealing='profile'", "calibration='none'", "'auto' or a path"],
        ),
        ({"cold_bits": 3}, ["cold_bits: got 3", "one of 'auto', 0, 2, 4, 8", "default 'auto'"]),
        ({"cold_loss": 1.5}, ["cold_loss: got 1.5", ">= 0 and <= 1", "default null"]),
        (
            {"cold_bits": 8, "dealing": "equal"},
            ["cold_bits=8", "dealing='equal'", "'global' or 'profile', or cold_bits to 0"],
        ),
        ({"recent_tokens": 4}, ["recent_tokens=4", "window=8", "at least 8", "at most 4"]),
        ({"sink_tokens": -1, "seed": -1}, ["sink_tokens: got -1", "seed: got -1"]),
        (None, ["NoneType", "JSON object"]),
        ([1], ["list", "JSON object"]),
    ],
)
def test_bad_values_say_what_was_given_and_what_is_allowed(given: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        DeltaMemConfig.from_dict(given)
    for word in words:
        assert word in str(error.value)


def test_single_fields_are_checked_without_rules_between_fields() -> None:
    check_fields({"window": 64})
    check_fields({"low_watermark": 0.95})
    with pytest.raises(ConfigError):
        DeltaMemConfig.from_dict({"window": 64})


def test_it_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DeltaMemConfig().keep_ratio = 0.5  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    lines = dict(zip(DeltaMemConfig.model_fields, field_help(), strict=True))
    for name, line in lines.items():
        assert line.startswith(f"{name}: ")
        assert line.endswith(".")
        assert "\n" not in line
        assert "None" not in line and "<class" not in line, "a user writes JSON or YAML"
    assert lines["window"].startswith("window: int = 8 [>= 1 and <= 256]: How many")
    assert lines["keep_tokens"].startswith("keep_tokens: int or null = null [>= 1]: Tokens")
    assert lines["mode"].startswith("mode: str = 'pressure' [one of 'pressure', 'always']: `pressure` evicts")


def test_null_leaves_an_optional_field_out() -> None:
    assert DeltaMemConfig.from_dict({"keep_tokens": None, "coverage": None}) == DeltaMemConfig()
    # Between them only with coverage: without it, the upper bound bounds nothing.
    assert DeltaMemConfig.from_dict({"keep_ratio": 0.5, "max_keep_ratio": 0.25}).coverage is None


def test_scorers_are_looked_up_by_name() -> None:
    DeltaMemConfig().check_scorers()
    with pytest.raises(ConfigError, match=r"'snapvk' \(did you mean 'snapkv'\?\); available: delta, snapkv"):
        DeltaMemConfig(scorer="snapvk").check_scorers(["snapkv", "delta"])
    config = DeltaMemConfig(scorer="delta", request_scorers=["snapkv", "delta", "tovaa"])
    assert config.scorers == ("delta", "snapkv", "tovaa")
    with pytest.raises(ConfigError, match="unknown scorer 'tovaa'"):
        config.check_scorers(["snapkv", "delta"])


@pytest.mark.parametrize(
    ("given", "full_speed", "bits"),
    [
        ({}, True, 4),
        ({}, False, 0),
        ({"cold_bits": 0}, True, 0),
        ({"cold_bits": 2}, False, 2),
        ({"cold_bits": 0, "dealing": "equal"}, False, 0),
    ],
)
def test_auto_bits_depend_on_what_reads_them(given: dict[str, Any], full_speed: bool, bits: int) -> None:
    before = DeltaMemConfig.from_dict(given)
    assert before.has_cold == (before.cold_bits not in ("auto", 0))
    config = before.resolved(None, predictor=False, cold=full_speed)
    assert (config.cold_bits, config.has_cold) == (bits, bits > 0)


@pytest.mark.parametrize(
    ("given", "calibration", "predictor", "scorer"),
    [
        ({}, "/made", True, "predictor-tova"),
        ({}, "/made", False, "tova"),
        ({}, None, False, "distinct"),
        ({"dealing": "equal"}, None, False, "tova"),
        # Found for the sake of a scorer that requests may name.
        ({"dealing": "equal"}, "/made", True, "tova"),
        ({"scorer": "keydiff"}, "/made", True, "keydiff"),
    ],
)
def test_auto_depends_on_what_was_found(
    given: dict[str, str], calibration: str | None, predictor: bool, scorer: str
) -> None:
    config = DeltaMemConfig(**given).resolved(calibration, predictor=predictor)
    assert (config.scorer, config.calibration) == (scorer, calibration or "none")


def test_pure_modules_import_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, deltamem_vllm.config, deltamem_vllm.request_options, deltamem_vllm.versions, "
        "deltamem_vllm.plugin; print(sorted({'torch', 'vllm'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1", "0.32.1rc1"])
def test_supported_vllm(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.33.0.dev1", "1.0", "dev"])
def test_unsupported_vllm(version: str) -> None:
    with pytest.raises(UnsupportedVLLM) as error:
        check_vllm_version(version)
    assert version in str(error.value)
    assert SUPPORTED_VLLM in str(error.value)
