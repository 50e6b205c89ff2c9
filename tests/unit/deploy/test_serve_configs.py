# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""configs/serve/*.yaml in the hands of vLLM's own command line, and their headers against `deltamem plan`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.plugin import register
from tests.support.deploy import DOCKER, DOCKERFILES, ROOT, SERVE, read_yaml, script

FILES = {path.stem: path for path in SERVE}
every = pytest.mark.parametrize("path", SERVE, ids=lambda path: path.stem)


def parse(*words: str) -> argparse.Namespace:
    """What `vllm serve WORDS` ends up with."""
    register()
    top = FlexibleArgumentParser(prog="vllm")
    make_arg_parser(top.add_subparsers(dest="subparser").add_parser("serve", usage="vllm serve"))
    return top.parse_args(["serve", *words])


def engine_args(args: argparse.Namespace) -> AsyncEngineArgs:
    """vLLM's engine arguments; offline it looks for the model's files unless the name is a folder's."""
    args.model = str(ROOT)
    return AsyncEngineArgs.from_cli_args(args)


def header(path: Path) -> list[str]:
    """The comment before the first setting, without the signs."""
    lines = path.read_text().splitlines()
    end = next(at for at, line in enumerate(lines) if not line.startswith("#") and line)
    return [line.removeprefix("#").strip() for line in lines[:end]]


def plan_command(path: Path) -> list[str]:
    """The `deltamem plan` that the header names."""
    (command,) = re.findall(r"`deltamem (plan [^`]+)`", " ".join(header(path)))
    return str(command).split()


def test_all_four_are_there() -> None:
    assert set(FILES) == {"cpu", "h100-80gb", "llama-70b-on-24gb", "rtx4090-24gb"}


@every
def test_every_setting_is_explained(path: Path) -> None:
    lines = path.read_text().splitlines()
    settings = [at for at, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")]
    assert len(settings) > 8
    unexplained = [lines[at] for at in settings if not lines[at - 1].lstrip().startswith("# ")]
    unexplained = [line for line in unexplained if "#" not in line]
    assert unexplained == []


@every
def test_vllm_takes_every_line_as_it_is_meant(path: Path) -> None:
    given = read_yaml(path)
    args = parse("--config", str(path))
    for name, value in given.items():
        if name not in ("model", "kv-cache-policy", "deltamem-config", "served-model-name"):
            assert getattr(args, name.replace("-", "_")) == value, name
    engine = engine_args(args)
    assert engine.served_model_name == [given["served-model-name"]]
    # Exactly what the file says and the defaults, in the place where every process of the server looks.
    config = DeltaMemConfig.from_additional_config(engine.additional_config)
    assert config == DeltaMemConfig.from_dict(given["deltamem-config"])
    assert config == DeltaMemConfig(mode="pressure", keep_ratio=0.25)


@every
def test_the_model_is_that_of_the_file_unless_another_one_is_named(path: Path) -> None:
    assert parse("--config", str(path)).model_tag is None
    assert parse("--config", str(path)).model == read_yaml(path)["model"]
    # `vllm serve` itself takes the positional one first.
    assert parse("other/model", "--config", str(path)).model_tag == "other/model"


@every
def test_a_server_is_this_machines_own_until_it_is_told_otherwise(path: Path) -> None:
    assert parse("--config", str(path)).host == "127.0.0.1"
    assert parse("--config", str(path), "--host", "0.0.0.0").host == "0.0.0.0"


@every
def test_the_command_line_changes_one_setting_of_the_policy(path: Path) -> None:
    engine = engine_args(parse("--config", str(path), "--deltamem-config.keep_ratio", "0.5"))
    config = DeltaMemConfig.from_additional_config(engine.additional_config)
    assert config == DeltaMemConfig(mode="pressure", keep_ratio=0.5)


@every
def test_a_misspelt_setting_stops_the_command(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text(path.read_text().replace("  keep_ratio:", "  keep_ration:"))
    with pytest.raises(SystemExit):
        parse("--config", str(broken))
    assert "did you mean 'keep_ratio'" in capsys.readouterr().err


@every
def test_the_header_quotes_what_plan_says_of_these_settings(
    path: Path, smollm2_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltamem_vllm.cli.main import app

    monkeypatch.setenv("COLUMNS", "160")
    command = plan_command(path)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    said = {" ".join(line.split()) for line in done.output.splitlines()}
    quoted = [" ".join(line.removeprefix("plan> ").split()) for line in header(path) if line.startswith("plan> ")]
    assert len(quoted) > 1
    assert [line for line in quoted if line not in said] == []
    # And plan was asked about what is served, where the file is for a card.
    given = read_yaml(path)
    if "gpu-memory-utilization" in given:
        assert f"--gpu-memory-utilization {given['gpu-memory-utilization']} makes" in done.output
        assert f"batches of {given['max-num-batched-tokens']} tokens" in done.output
        assert command[command.index("--max-num-seqs") + 1] == str(given["max-num-seqs"])
        assert f"{given['max-model-len'] // 1024}k" in command
        assert str(given["deltamem-config"]["keep_ratio"]) in command


def test_the_offload_is_plans_figure_for_this_length() -> None:
    given = read_yaml(FILES["llama-70b-on-24gb"])
    from deltamem_vllm.cli.main import app

    command = [*plan_command(FILES["llama-70b-on-24gb"]), "--json"]
    # Not the JSON's layout, which is plan's own: the figure stands in the commands that it makes.
    said = json.loads(CliRunner().invoke(app, command).output)
    text = json.dumps(said)
    wanted = f"--max-model-len {given['max-model-len']} --max-num-seqs 1 --max-num-batched-tokens 1024"
    found = [line for line in re.findall(r"vllm serve [^\"]*", text) if wanted in line and "keep_ratio 0.25" in line]
    assert found, "plan --json has a command for each cell"
    assert all(f"--cpu-offload-gb {given['cpu-offload-gb']}" in line for line in found)


def test_the_pool_of_the_cpu_is_as_large_as_the_header_says() -> None:
    text = " ".join(header(FILES["cpu"]))
    pool = read_yaml(FILES["cpu"])["kv-cache-memory-bytes"]
    token = 22.5 * 1024
    assert f"{int(pool / token):,} tokens" in text
    assert f"in blocks of 32 {int(pool // (token * 32)) * 32:,}" in text


def container_commands() -> dict[str, list[str]]:
    """Every command that an image, a service or a pod starts its server with."""
    dockerfile = script("dockerfile")
    found: dict[str, list[str]] = {}
    for path in DOCKERFILES:
        (step,) = [step for step in dockerfile.parse(path.read_text()) if step.keyword == "CMD"]
        found[path.name] = step.words()
    for name, service in read_yaml(DOCKER / "compose.yaml")["services"].items():
        if "profiles" in service and "command" in service:
            found[f"compose {name}"] = service["command"]
    (container,) = read_yaml(DOCKER / "kubernetes" / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    return found | {"kubernetes": container["args"]}


@pytest.mark.parametrize("name", sorted(container_commands()))
def test_containers_start_what_vllm_understands_with_the_policy_on(name: str) -> None:
    words = container_commands()[name]
    # The images copy configs/serve there.
    here: list[str] = [word.replace("/opt/deltamem/serve", str(ROOT / "configs" / "serve")) for word in words]
    args: Any = parse(*here)
    assert args.host == "0.0.0.0", "a container that listens to itself cannot be reached"
    assert args.port in (8000, None)
    engine = engine_args(args)
    assert DeltaMemConfig.from_additional_config(engine.additional_config).mode == "pressure"
