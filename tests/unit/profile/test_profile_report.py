# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a profile reports: shares and masses, the table, the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image, ImageColor
from typer.testing import CliRunner

from deltamem_vllm.cli.profile import profile as command
from deltamem_vllm.evaluation.profile.comparison import comparison_of
from deltamem_vllm.evaluation.profile.document import write_profile
from deltamem_vllm.evaluation.profile.meaning import meaning_of
from deltamem_vllm.evaluation.profile.pictures.style import CODED, EXACT
from deltamem_vllm.evaluation.profile.summary import mark_kept, memory_kept
from deltamem_vllm.scoring.registry import BUILTIN, available_scorers
from tests.support.profile_toy import BLOCK, COLD, HEADS, HOT, LAYERS, MADE, TOKEN_BYTES, make, recording

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(command)


def test_shares_and_masses_of_a_profile() -> None:
    made = make()
    assert {name: int(one.tokens.sum()) for name, one in made.dealt.items()} == dict.fromkeys(made.dealt, 6 * 24)
    assert (made.dealt["equal"].tokens == 24).all()
    assert np.array_equal(made.dealt["done"].attention_mass, made.dealt["equal"].attention_mass)
    total = {name: one.attention_mass.mean() for name, one in made.dealt.items()}
    # Rows of attention sum to 1, so the mean over heads is what the ranking by attention maximises.
    assert total["by_attention"] == max(total.values()) > total["equal"]
    assert make("keydiff").dealt["equal"].utility_mass is None


def test_a_deal_is_compared_with_equal_shares_of_the_same_memory() -> None:
    made = make(dealing="global")
    counts = BLOCK * np.array([[1, 6], [4, 1], [3, 3]])
    assert np.array_equal(made.dealt["done"].tokens, counts)
    assert {name: int(one.tokens.sum()) for name, one in made.dealt.items()} == dict.fromkeys(made.dealt, 6 * 24)
    compared = comparison_of(made)
    assert compared.done and compared.dealt is made.dealt["done"] and compared.equal is made.dealt["equal"]
    assert np.array_equal(compared.ratio, counts / 24)
    assert made.pages(0).tolist() == [[1, 6], [4, 1], [3, 3]]
    assert made.pages(1).tolist() == [[3, 8], [2, 1], [1, 3]]
    # A head with fewer tokens than its equal share keeps no more of its own utility, and one with more no less.
    equal, done = compared.equal.utility_mass, compared.dealt.utility_mass
    assert equal is not None and done is not None
    assert ((done <= equal) | (counts > 24)).all() and ((done >= equal) | (counts < 24)).all()


@pytest.mark.parametrize(
    ("dealing", "comparable", "calibration", "words"),
    [
        ("global", True, "0123", "the utility of this prompt and the model's calibration"),
        ("global", True, None, "the utility of this prompt"),
        ("global", False, "0123", "the model's calibration"),
        ("profile", True, "0123", "the model's calibration"),
        ("global", False, None, "nothing, so equal: scores of tova do not compare, and the model has no calibration"),
    ],
)
def test_a_profile_says_what_was_dealt_by(dealing: str, comparable: bool, calibration: str | None, words: str) -> None:
    made = make(dealing=dealing, comparable_scores=comparable, calibration=calibration)
    assert comparison_of(made).basis == words


def test_memory_and_marks_in_the_summary() -> None:
    made = make()
    assert memory_kept(made) == pytest.approx(
        {"first_bytes": 25 / 121, "first_blocks": 4 / 16, "end_bytes": 29 / 140, "end_blocks": 4 / 18}
    )
    exact, coded = np.zeros((2, 2, 2, 10), dtype=bool)
    exact[0, 0, 3:5] = coded[0, 0, 5] = coded[1, 1, 5] = True
    coded[:, :, :3] = exact[:, :, 6:] = True  # outside the passage
    found = mark_kept({"name": "x", "start": 3, "stop": 6}, exact, coded)
    assert (found.tokens, found.whole, found.part) == (3, 1, 1)
    assert (found.share, found.coded) == (pytest.approx(4 / 12), pytest.approx(2 / 12))


def test_every_built_in_scorer_says_whether_its_utilities_compare() -> None:
    found = {name: meaning_of(name).comparable for name in BUILTIN}
    assert found == {
        "tova": "yes", "snapkv": "yes", "delta": "partly", "predictor": "yes", "predictor-tova": "yes",
        "distinct": "yes", "keydiff": "no", "streaming": "no", "random": "no",
    }  # fmt: skip
    # A scorer whose scores the engine deals pages by must be one whose scores compare.
    dealt_by = {name for name, scorer in available_scorers().items() if scorer.comparable}
    assert {found[name] for name in dealt_by & BUILTIN.keys()} <= {"yes"}
    assert meaning_of("tova").ranking == "by_utility"
    assert meaning_of("keydiff").ranking == meaning_of("of another package").ranking == "by_attention"


def test_coded_tokens_count_as_kept_and_their_pages_as_memory() -> None:
    made = make(dealing="global", cold=True)
    done, equal = made.dealt["done"], made.dealt["equal"]
    coded = np.array([[sum(head) for head in layer] for layer in MADE[0]])
    assert np.array_equal(done.coded, coded) and np.array_equal(done.tokens, BLOCK * HOT[0] + coded)
    assert np.array_equal(done.memory, BLOCK * (HOT[0] + COLD[0]))
    assert {int(one.memory.sum()) for one in made.dealt.values()} == {6 * 24}
    assert not equal.coded.any() and (equal.tokens == 24).all()
    compared = comparison_of(made)
    assert np.array_equal(compared.ratio, (HOT[0] + COLD[0]) / 3)

    raw, first = recording(dealing="global", cold=True), made.held[0]
    for at in np.ndindex(LAYERS, HEADS):
        for weights, mass, part in (
            (raw.attention[at], done.attention_mass, done.attention_coded),
            (raw.utility[at], done.utility_mass, done.utility_coded),
        ):
            assert mass is not None and part is not None
            exact, cold = (sum(float(weights[i]) for i in tokens[at]) for tokens in (first.exact, first.coded))
            assert part[at] == pytest.approx(cold / weights.sum(), abs=1e-6)
            assert mass[at] == pytest.approx((exact + cold) / weights.sum(), abs=1e-6)
    assert not equal.attention_coded.any()
    assert make("keydiff", "global", cold=True).dealt["done"].utility_coded is None


def test_memory_of_a_profile_with_cold_pages() -> None:
    made = make(dealing="global", cold=True)
    step = made.steps[2]
    assert step["tier_bytes"]["cold"] == 8 * BLOCK * TOKEN_BYTES // 6 and step["cold_tokens"] == 145 // 6
    # Both tiers are memory.
    assert memory_kept(made)["first_bytes"] == pytest.approx(25 / 121)


@pytest.mark.parametrize(("dealing", "cold"), [("equal", False), ("global", False), ("global", True)])
@pytest.mark.parametrize("scorer", ["tova", "keydiff"])
def test_drawing_again_from_the_json(tmp_path: Path, scorer: str, dealing: str, cold: bool) -> None:
    write_profile(make(scorer, dealing, cold=cold), tmp_path / "profile.json")
    flags = ["--from", str(tmp_path / "profile.json"), "--out", str(tmp_path / "pictures")]
    result = CliRunner().invoke(APP, flags)
    assert result.exit_code == 0, result.output
    printed = " ".join(result.stdout.split())
    if cold:
        assert "120 tokens to the room of 24 on average" in printed
        # 80 and 145 of the 720 entries; 8 of the 18 pages.
        assert "11.1% of the entries exact, 20.1% coded (4 bits, up to 20 to a page), 68.8% gone" in printed
        assert "44% of the pages are cold" in printed
        assert "2 / 3 / 5 of 15 (lowest, median, highest)" in printed
        assert ("% of the utility, mean" in printed) == (scorer == "tova")
    else:
        assert "120 to 24 tokens" + (" on average" if dealing != "equal" else "") in printed
        assert ("1 / 3 / 6 of 15 (lowest, median, highest)" in printed) == (dealing != "equal")
    assert ("coded" in printed) == ("cold" in printed) == cold
    assert ("dealt by the model's calibration" in printed) == (dealing != "equal")
    assert ("if shares were equal" in printed) == (dealing != "equal")
    assert "fact (5 tokens)" in result.stdout
    assert ("compare between heads: no" in printed) == (scorer == "keydiff" and dealing == "equal")
    assert ("retained utility" in printed) == (scorer == "tova")
    for name in ("utility", "kept", "pages", "bytes", "shares", "overview"):
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert picture.width == (1920 if name == "overview" else 1600)
            colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 24)}
        assert len(colours) > 20
        if name in ("kept", "bytes"):
            assert (ImageColor.getrgb(CODED) in colours) == cold
            assert ImageColor.getrgb(EXACT) in colours
