# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What `deltamem profile` takes: prompts, settings, and what is refused before an engine starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from deltamem_vllm.cli.profile import profile as command
from deltamem_vllm.evaluation.profile import run as profile_run
from deltamem_vllm.evaluation.profile.build import policy_of, tokens_kept
from deltamem_vllm.evaluation.profile.prompt import Prompts

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(command)
LONG = "word " * 400


@pytest.fixture(scope="module")
def prompts(smollm2_path: str) -> Prompts:
    tokenizer, positions = profile_run._load(smollm2_path)
    assert positions == 8192
    return Prompts(tokenizer, chat=True)


def test_the_built_in_prompt_marks_its_needle(prompts: Prompts) -> None:
    prompt = prompts.needle(600, seed=3)
    assert 580 <= len(prompt.token_ids) <= 600
    needle, answer = prompt.marks
    assert prompts.decode(prompt.token_ids[needle["start"] : needle["stop"]]).strip().startswith("The special magic")
    assert prompts.decode(prompt.token_ids[answer["start"] : answer["stop"]]).strip() == prompt.question["answer"]
    assert prompt.text.endswith("mentioned in the text is")
    assert prompt.facts(f" {prompt.question['answer']}.")["answered"] is True
    assert prompt.facts(" 1.")["answered"] is False


def test_a_users_text_stays_out_of_the_profile(prompts: Prompts) -> None:
    prompt = prompts.from_text("The code of the safe is 4711. Mind it.", "--text", ["4711"])
    (mark,) = prompt.marks
    assert "4711" in prompts.decode(prompt.token_ids[mark["start"] : mark["stop"]])
    facts = json.dumps(prompt.facts("the safe opens"))
    assert "safe" not in facts and "Mind" not in facts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", " \n"], "the prompt (--text) is empty"),
        (["--text", "Hello"], "leaves requests under min_tokens=256 alone"),
        (["--text", LONG, "--prompt-file", "x.txt"], "are two prompts"),
        (["--prompt-file", "missing.txt"], "cannot read --prompt-file missing.txt: No such file"),
        (["--length", "9000"], "9000 prompt tokens and 64 output tokens are 9064, and the model has 8192 positions"),
        (["--text", LONG * 21], "and the model has 8192 positions; shorten the prompt to 8128"),
        (["--length", "50"], "--length: length 50 leaves no room"),
        (["--scorer", "tovva"], "unknown scorer 'tovva' (did you mean 'tova'?)"),
        (["--keep-ratio", "1.5"], "keep_ratio: got 1.5, allowed: float, > 0 and <= 1"),
        (["--keep-ratio", "0"], "keep_ratio: got 0"),
        (["--text", LONG, "--keep-ratio", "1"], "which frees no block of 32 tokens"),
        (["--text", LONG, "--keep-ratio", "1", "--dealing", "equal"], "give a lower --keep-ratio or a longer prompt"),
        (["--text", LONG, "--deltamem-config", '{"keep_tokens": 9999}'], "give a lower keep_tokens or a longer prompt"),
        (["--dealing", "fair"], "dealing: got 'fair', allowed: str, one of 'global', 'profile', 'equal'"),
        (["--text", LONG, "--mark", "unicorn"], "--mark 'unicorn' is 0 times in the prompt"),
        (["--mark", "x"], "--mark needs --text or --prompt-file"),
        (["--deltamem-config", "{"], "is no JSON"),
        (["--deltamem-config", "[]"], "must be a JSON object"),
        (["--deltamem-config", '{"scorer": "tova"}'], "give it as --scorer"),
        (["--deltamem-config", '{"dealing": "equal"}'], "give it as --dealing"),
        (["--deltamem-config", '{"mode": "pressure"}'], "a profile always compacts its prompt"),
        (["--deltamem-config", '{"windw": 4}'], "did you mean 'window'?"),
        (["--model", "./nowhere"], "cannot read the model './nowhere'"),
        (["--from", "missing.json"], "cannot read missing.json"),
        (["--from", "a.json", "--text", "x"], "takes no prompt"),
    ],
)
@pytest.mark.usefixtures("smollm2_path")
def test_bad_input_is_explained_before_an_engine_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    def engine(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(profile_run, "Engine", engine)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(APP, arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.startswith("deltamem profile: ")
    assert list(tmp_path.iterdir()) == []


def test_the_budget_is_the_schedulers() -> None:
    assert tokens_kept(policy_of({"keep_ratio": 0.1, "dealing": "equal"}), 2048, 32) == 205
    assert tokens_kept(policy_of({"keep_ratio": 0.1, "dealing": "equal", "min_tokens": 0}), 200, 32) == 20
    assert tokens_kept(policy_of({"keep_ratio": 0.1}), 2048, 32) == 6 * 32
    assert tokens_kept(policy_of({"keep_tokens": 100}), 2048, 32) == 3 * 32
    # How much coverage keeps is known once the prompt is: at most this.
    assert tokens_kept(policy_of({"coverage": 0.9, "max_keep_ratio": 0.5}), 2048, 32) == 1024
    assert tokens_kept(policy_of({"coverage": 0.9}), 2048, 32) == 2048


def test_a_profile_always_compacts() -> None:
    assert policy_of({}).mode == "always"
