# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The flags, through vLLM's own parser."""

from __future__ import annotations

import argparse
import itertools
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from deltamem_vllm.config import ConfigError, DeltaMemConfig
from deltamem_vllm.plugin import register

ON = ["--kv-cache-policy", "deltamem"]


def parser() -> FlexibleArgumentParser:
    """vLLM's own parser, with `serve` as a subcommand as in its command line."""
    register()
    top = FlexibleArgumentParser(prog="vllm")
    make_arg_parser(top.add_subparsers(dest="subparser").add_parser("serve", usage="vllm serve"))
    return top


def parse(*args: str) -> argparse.Namespace:
    parsed = parser().parse_args(["serve", "some-model", *args])
    # `vllm serve` copies the positional name later; offline, vLLM looks for the default model unless this is a folder.
    parsed.model = str(Path(__file__).parent)
    return parsed


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_without_the_flag_arguments_are_stock() -> None:
    args = parse("--additional-config", '{"x": 1}', "--additional-config.y", "2")
    assert args.additional_config == {"y": 2}, "vLLM keeps the last one"
    assert (args.kv_cache_policy, args.deltamem_config) == (None, None)
    assert parse("--kv-cache-policy", "none").additional_config == {}


def test_policy_alone_uses_the_defaults() -> None:
    assert parse(*ON).additional_config == {"deltamem": {}}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_mixed_forms_lose_nothing_in_any_order(order: tuple[int, ...]) -> None:
    groups = [
        [*ON, "--deltamem-config", '{"keep_ratio": 0.2}'],
        ["--deltamem-config.window", "8", "--deltamem_config.scorer=tova"],
        ["--additional-config", '{"x": 1, "deep": {"a": 1}}'],
        ["--additional-config.y", "2", "--additional-config.deep.b", "3"],
    ]
    args = parse(*itertools.chain.from_iterable(groups[i] for i in order))
    assert args.additional_config == {
        "x": 1,
        "y": 2,
        "deep": {"a": 1, "b": 3},
        "deltamem": {"keep_ratio": 0.2, "window": 8, "scorer": "tova"},
    }


def test_additional_config_alone_turns_it_on_and_joins_the_flag() -> None:
    assert parse("--additional-config.deltamem.window", "4").additional_config == {"deltamem": {"window": 4}}
    args = parse(*ON, "--deltamem-config.seed", "3", "--additional-config.deltamem.window", "4")
    assert args.additional_config["deltamem"] == {"window": 4, "seed": 3}


@pytest.mark.parametrize("as_map", [True, False])
def test_yaml(tmp_path: Path, as_map: bool) -> None:
    config = "deltamem-config:\n  keep_ratio: 0.2\n  window: 8\n"
    if not as_map:
        config = "deltamem-config.keep_ratio: 0.2\ndeltamem-config.window: 8\n"
    file = tmp_path / "serve.yaml"
    file.write_text("kv-cache-policy: deltamem\nadditional-config:\n  x: 1\n" + config)
    args = parse("--config", str(file), "--additional-config.y", "2")
    assert args.additional_config == {"x": 1, "y": 2, "deltamem": {"keep_ratio": 0.2, "window": 8}}


def test_the_command_line_wins_over_yaml(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("kv-cache-policy: deltamem\ndeltamem-config: {keep_ratio: 0.2, window: 8}\n")
    logging.getLogger("deltamem_vllm").addHandler(caplog.handler)
    try:
        args = parse("--config", str(file), "--deltamem-config.keep_ratio", "0.5")
    finally:
        logging.getLogger("deltamem_vllm").removeHandler(caplog.handler)
    assert args.additional_config["deltamem"] == {"keep_ratio": 0.5, "window": 8}
    assert "--deltamem-config.keep_ratio: 0.5 replaces 0.2" in caplog.text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--deltamem-config", "{}"], "without --kv-cache-policy deltamem"),
        (["--kv-cache-policy", "none", "--deltamem-config", "{}"], "none together with --deltamem-config"),
        (["--kv-cache-policy", "none", "--additional-config.deltamem.window", "4"], "none together with"),
        (["--kv-cache-policy", "h2o"], "invalid choice: 'h2o'"),
        ([*ON, "--deltamem-config.keep_ration", "0.1"], "did you mean 'keep_ratio'"),
        ([*ON, "--additional-config.deltamem.keep_ration", "0.1"], "did you mean 'keep_ratio'"),
        ([*ON, "--deltamem-config.keep_ratio", "2"], "keep_ratio: got 2, allowed: float, > 0 and <= 1"),
        ([*ON, "--deltamem-config.window", "64"], "recent_tokens=8 is smaller than window=64"),
        ([*ON, "--deltamem-config", "{"], "not JSON"),
        ([*ON, "--deltamem-config", "[1]"], "expected a JSON object"),
        (
            [*ON, "--deltamem-config.window", "8", "--additional-config.deltamem.window", "4"],
            "different values for window (8 against 4)",
        ),
    ],
)
def test_conflicts_and_bad_values_stop_the_command(
    capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    assert words in refused(capsys, *args)


def test_help_lists_every_field(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    # vLLM keeps the searched group on the class.
    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["serve", "--help=DeltaMemConfig"])
    assert stop.value.code == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("--kv-cache-policy {none,deltamem}") for line in lines)
    for name in DeltaMemConfig.model_fields:
        assert sum(line.startswith(f"- {name}: ") for line in lines) == 1, name


def test_a_spawned_api_server_gets_the_policy() -> None:
    """It unpickles parsed arguments before our plugin is loaded, so vLLM's own code must carry the policy."""
    args = pickle.loads(pickle.dumps(parse(*ON, "--deltamem-config.window", "8")))
    stock = vars(AsyncEngineArgs.from_cli_args.__func__)["__wrapped__"]  # type: ignore[attr-defined]
    assert stock(AsyncEngineArgs, args).additional_config == {"deltamem": {"window": 8}}


def test_reading_parsed_arguments_again_changes_nothing() -> None:
    args = parse(*ON, "--deltamem-config.window", "8", "--additional-config.x", "1")
    for _ in range(2):
        assert AsyncEngineArgs.from_cli_args(args).additional_config == {"x": 1, "deltamem": {"window": 8}}


def test_a_namespace_made_by_hand_is_folded_too() -> None:
    args = parse()
    args.deltamem_config = {"window": 8}
    with pytest.raises(ConfigError, match="without --kv-cache-policy deltamem"):
        AsyncEngineArgs.from_cli_args(args)
    args.kv_cache_policy = "deltamem"
    assert AsyncEngineArgs.from_cli_args(args).additional_config == {"deltamem": {"window": 8}}


def test_flags_are_added_once_per_parser() -> None:
    one: Any = FlexibleArgumentParser()
    AsyncEngineArgs.add_cli_args(one)
    from deltamem_vllm.integration.cli_args import add_flags

    add_flags(one)
    assert sum("--deltamem-config" in action.option_strings for action in one._actions) == 1
