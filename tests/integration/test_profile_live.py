# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem profile` with the real model and engine: what it writes down is what the engine did."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from deltamem_vllm.cli.profile import profile as command
from deltamem_vllm.evaluation.profile.document import read_profile

SINKS, RECENT, PROMPT, OUTPUT, BLOCK = 4, 16, 500, 100, 32
CONFIG = {"sink_tokens": SINKS, "recent_tokens": RECENT, "interval": 32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scorer", "dealing", "cold_bits", "basis"),
    [
        ("snapkv", "equal", 0, ""),
        ("tova", "profile", 0, "the model's calibration"),
        ("distinct", "global", 4, "the utility of this prompt and the model's calibration"),
        # Its scores last: later compactions rate only what is new, as a server does.
        ("predictor", "profile", 8, "the model's calibration"),
        ("predictor-tova", "global", 4, "the model's calibration"),
    ],
)
@pytest.mark.usefixtures("smollm2_path")
def test_a_profile_agrees_with_the_engine(
    tmp_path: Path, scorer: str, dealing: str, cold_bits: int, basis: str
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    flags = ["--length", str(PROMPT), "--output-tokens", str(OUTPUT), "--scorer", scorer, "--out", str(tmp_path)]
    flags += ["--dealing", dealing, "--keep-ratio", "0.2"]
    result = CliRunner().invoke(
        app, [*flags, "--deltamem-config", json.dumps(CONFIG | {"cold_bits": cold_bits}), "--chunk", "200"]
    )
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

    cold_page = made.engine["cold"]["page_tokens"] if cold_bits else 0
    assert made.tiered == bool(cold_bits)
    assert not cold_bits or made.engine["cold"]["bits"] == made.engine["policy"]["cold_bits"] == cold_bits

    # Tokens followed from what was told of each compaction against the levels that the engine reported, step by step.
    for number, step in enumerate(steps):
        done = [i for i, c in enumerate(compactions) if c.facts["step"] <= number]
        token_bytes = made.engine["block_bytes"] // BLOCK
        assert step["logical_bytes"] == step["logical_tokens"] * token_bytes
        if not done:
            assert step["resident_tokens"] == step["logical_tokens"] and step["cold_tokens"] == 0
            assert step["tier_bytes"] == {"hot": step["resident_tokens"] * token_bytes, "cold": 0}
            continue
        held, since = made.held[done[-1]], compactions[done[-1]].facts["logical_len"]
        positions = held.exact.followed_by(since, step["logical_tokens"])
        assert all((np.diff(head) > 0).all() for heads in positions.layers() for head in heads)
        # In pages of a block's size, the coded tokens' among them, is what the scheduler counts.
        assert len(positions.values) + BLOCK * len(held.sizes.values) == 90 * step["resident_tokens"]
        assert step["tier_bytes"]["hot"] == pytest.approx(len(positions.values) * token_bytes / 90, abs=1)
        assert step["tier_bytes"]["cold"] == int(len(held.sizes.values) / 90 * BLOCK * token_bytes)
        assert step["cold_tokens"] == len(held.coded.values) // 90
        assert bool(step["cold_tokens"]) == bool(cold_bits)
        assert (positions.mask(step["logical_tokens"]) & held.coded.mask(step["logical_tokens"])).sum() == 0
        assert (held.sizes.values <= cold_page).all() and (held.sizes.values > 0).all()
    if cold_bits:
        later = [compaction.coded for compaction in compactions[1:]]
        assert any(coded is not None and coded.stay.counts.sum() > 0 for coded in later)

    kept = [held.exact for held in made.held]
    for number, (compaction, positions) in enumerate(zip(compactions, kept, strict=True)):
        facts, cold = compaction.facts, made.cold_pages(number)
        assert facts["dealing"] == dealing
        for head in (head for heads in positions.layers() for head in heads):
            assert (head[:SINKS] == np.arange(SINKS)).all()
            assert (head[-RECENT:] == np.arange(facts["logical_len"] - RECENT, facts["logical_len"])).all()
        # Bytes before and after, and the block that the step's own token may have needed.
        before, after = steps[facts["step"] - 1]["blocks"], steps[facts["step"]]["blocks"]
        assert before == facts["source_blocks"] == -(-facts["resident_before"] // BLOCK)
        assert after == -(-(facts["keep"] + 1) // BLOCK)
        assert (positions.counts + BLOCK * cold).mean() == facts["keep"]
        assert (len({*(positions.counts + BLOCK * cold).flat}) == 1) == (dealing == "equal")
        if dealing != "equal":
            assert (positions.counts % BLOCK == 0).all() and positions.counts.min() >= BLOCK
            assert made.pages(number).sum() == 90 * facts["target_blocks"]
    freed = sum(c.facts["source_blocks"] - c.facts["target_blocks"] for c in compactions)
    assert made.counters["freed_blocks"] == freed > 0
    assert made.counters["compactions"] == len(compactions)

    # The utilities written down are those that chose: none that was dropped exceeds one that was kept, and none that
    # was coded one that is exact.
    facts, codes = compactions[0].facts, made.codes.astype(int)
    free = slice(SINKS, prompt - RECENT)
    exact, coded = kept[0].mask(prompt), made.held[0].coded.mask(prompt)
    for better, others in ((exact, ~exact), (exact | coded, ~(exact | coded))):
        lowest = np.where(better, codes, 1000)[..., free].min(2)
        assert (np.where(others, codes, -1)[..., free].max(2) <= lowest).all()
    done, equal = made.dealt["done"], made.dealt["equal"]
    assert (equal.tokens == facts["keep"]).all() and np.array_equal(done.tokens - done.coded, kept[0].counts)
    assert np.array_equal(done.coded, made.held[0].coded.counts) and done.memory.sum() == equal.memory.sum()
    assert 0 < equal.attention_mass.min() < equal.attention_mass.max() <= 1
    # No way to hold exact tokens alone in this memory keeps more.
    most = made.dealt["by_attention"].attention_mass.mean()
    assert most > max(equal.attention_mass.mean(), (done.attention_mass - done.attention_coded).mean())
    assert ("coded tokens" in result.stdout) == bool(cold_bits)
    if dealing == "equal":
        assert np.array_equal(done.attention_mass, equal.attention_mass)
    else:
        assert made.engine["calibration"] is not None
        assert f"dealt by {basis}" in " ".join(result.stdout.split())
