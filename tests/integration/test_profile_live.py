# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem profile` with the real model and engine: what it writes down is what the engine did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from deltamem_vllm.cli.profile import profile as command
from deltamem_vllm.evaluation.profile.document import read_profile
from deltamem_vllm.evaluation.profile.recording import positions_after

SINKS, RECENT, PROMPT, OUTPUT, BLOCK = 4, 16, 500, 100, 32
CONFIG = f'{{"sink_tokens": {SINKS}, "recent_tokens": {RECENT}, "interval": 32}}'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scorer", "dealing", "basis"),
    [
        ("snapkv", "equal", ""),
        ("tova", "profile", "the model's calibration"),
        ("distinct", "global", "the utility of this prompt and the model's calibration"),
    ],
)
@pytest.mark.usefixtures("smollm2_path")
def test_a_profile_agrees_with_the_engine(tmp_path: Path, scorer: str, dealing: str, basis: str) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    flags = ["--length", str(PROMPT), "--output-tokens", str(OUTPUT), "--scorer", scorer, "--out", str(tmp_path)]
    flags += ["--dealing", dealing, "--keep-ratio", "0.2"]
    result = CliRunner().invoke(app, [*flags, "--deltamem-config", CONFIG, "--chunk", "200"])
    assert result.exit_code == 0, result.output
    assert "retained attention" in result.stdout
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "bytes.png", "kept.png", "overview.png", "pages.png", "shares.png", "utility.png",
    }  # fmt: skip

    made = read_profile(tmp_path / "profile.json")
    steps, compactions = made.steps, made.compactions
    prompt = made.prompt["tokens"]
    assert [step["kind"] for step in steps[:4]] == ["prefill", "prefill", "prefill", "compaction"]
    assert sum(step["new_tokens"] for step in steps) == steps[-1]["logical_tokens"] == prompt + OUTPUT - 1
    assert len(compactions) >= 2
    assert made.codes.shape == (30, 3, prompt)

    # Tokens followed from the survivors against the levels that the engine reported, step by step.
    kept = positions_after(compactions)
    for number, step in enumerate(steps):
        done = [i for i, c in enumerate(compactions) if c.facts["step"] <= number]
        if not done:
            assert step["resident_tokens"] == step["logical_tokens"]
            continue
        since = compactions[done[-1]].facts["logical_len"]
        positions = kept[done[-1]].followed_by(since, step["logical_tokens"])
        assert len(positions.values) == 90 * step["resident_tokens"]
        assert all((np.diff(head) > 0).all() for heads in positions.layers() for head in heads)

    for number, (compaction, positions) in enumerate(zip(compactions, kept, strict=True)):
        facts = compaction.facts
        assert facts["dealing"] == dealing
        for head in (head for heads in positions.layers() for head in heads):
            assert (head[:SINKS] == np.arange(SINKS)).all()
            assert (head[-RECENT:] == np.arange(facts["logical_len"] - RECENT, facts["logical_len"])).all()
        # Bytes before and after, and the block that the step's own token may have needed.
        before, after = steps[facts["step"] - 1]["blocks"], steps[facts["step"]]["blocks"]
        assert before == facts["source_blocks"] == -(-facts["resident_before"] // BLOCK)
        assert after == -(-(facts["keep"] + 1) // BLOCK)
        assert (positions.counts.mean() == facts["keep"]) and (len({*positions.counts.flat}) == 1) == (
            dealing == "equal"
        )
        if dealing != "equal":
            assert (positions.counts % BLOCK == 0).all() and positions.counts.min() >= BLOCK
            assert made.pages(number).sum() == 90 * facts["target_blocks"]
    freed = sum(c.facts["source_blocks"] - c.facts["target_blocks"] for c in compactions)
    assert made.counters["freed_blocks"] == freed > 0
    assert made.counters["compactions"] == len(compactions)
    for step in steps:
        token_bytes = made.engine["block_bytes"] // BLOCK
        assert step["tier_bytes"] == {"hot": step["resident_tokens"] * token_bytes}
        assert step["logical_bytes"] == step["logical_tokens"] * token_bytes

    # The utilities written down are those that chose: none that was dropped exceeds one that was kept.
    facts, codes = compactions[0].facts, made.codes.astype(int)
    held = kept[0].mask(prompt)
    free = slice(SINKS, prompt - RECENT)
    lowest_kept = np.where(held, codes, 1000)[..., free].min(2)
    assert (np.where(held, -1, codes)[..., free].max(2) <= lowest_kept).all()
    done, equal = made.dealt["done"], made.dealt["equal"]
    assert (equal.tokens == facts["keep"]).all() and np.array_equal(done.tokens, kept[0].counts)
    assert 0 < equal.attention_mass.min() < equal.attention_mass.max() <= 1
    assert made.dealt["by_attention"].attention_mass.mean() > max(
        equal.attention_mass.mean(), done.attention_mass.mean()
    )
    if dealing == "equal":
        assert np.array_equal(done.attention_mass, equal.attention_mass)
    else:
        assert made.engine["calibration"] is not None
        assert f"dealt by {basis}" in " ".join(result.stdout.split())
