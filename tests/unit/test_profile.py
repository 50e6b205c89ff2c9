# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem profile` without an engine: shares and masses against brute force, the JSON, the pictures, the errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner, Result

from deltamem_vllm.cli.profile import profile as command
from deltamem_vllm.evaluation.profile import run as profile_run
from deltamem_vllm.evaluation.profile.analysis import (
    bin_tokens,
    bin_width,
    deal,
    equal_split,
    held_mass,
    rank_in_head,
)
from deltamem_vllm.evaluation.profile.build import assemble, policy_of, tokens_kept
from deltamem_vllm.evaluation.profile.comparison import comparison_of
from deltamem_vllm.evaluation.profile.document import Profile, read_profile, write_profile
from deltamem_vllm.evaluation.profile.errors import ProfileError
from deltamem_vllm.evaluation.profile.meaning import meaning_of
from deltamem_vllm.evaluation.profile.packing import (
    from_codes,
    from_run_lengths,
    run_lengths,
    to_codes,
    utility_scale,
)
from deltamem_vllm.evaluation.profile.prompt import Prompts
from deltamem_vllm.evaluation.profile.ragged import Ragged
from deltamem_vllm.evaluation.profile.recording import Compaction, Recording, Step, lengths_before, positions_after
from deltamem_vllm.evaluation.profile.summary import mark_kept, memory_kept
from deltamem_vllm.scoring.base import select_survivors
from deltamem_vllm.scoring.registry import BUILTIN, available_scorers

APP = typer.Typer(pretty_exceptions_enable=False)
APP.command()(command)

LAYERS, HEADS, PROMPT, SINKS, RECENT, BLOCK, TOKEN_BYTES = 3, 2, 120, 2, 4, 8, 64


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def survivors(scores: Sequence[np.ndarray], keep: np.ndarray) -> Ragged:
    """Of each pair, in order, the `keep` tokens that the engine would choose."""
    layers, heads = keep.shape
    chosen = [
        select_survivors(torch.from_numpy(one)[None], int(count), SINKS, RECENT)[0].numpy()
        for one, count in zip(scores, keep.ravel(), strict=True)
    ]
    return Ragged.of([chosen[layer * heads : (layer + 1) * heads] for layer in range(layers)])


def compaction(step: int, index: Ragged, before: int, logical: int, scorer: str, dealing: str) -> Compaction:
    keep = int(index.counts.mean())
    facts = {
        "step": step,
        "scorer": scorer,
        "dealing": dealing,
        "serial": 0 if dealing == "equal" else step,
        "logical_len": logical,
        "resident_before": before,
        "keep": keep,
        "sink_tokens": SINKS,
        "recent_tokens": RECENT,
        "source_blocks": -(-before // BLOCK),
        "target_blocks": -(-keep // BLOCK),
    }
    return Compaction(facts, index)


def recording(scorer: str = "tova", dealing: str = "equal") -> Recording:
    """A prompt in two chunks, kept down to 24 tokens (a mean), and after 16 new ones again down to 25 or 24."""
    rng = np.random.default_rng(0)
    utility = (rng.random((LAYERS, HEADS, PROMPT)) ** 8).astype(np.float32)
    if scorer == "keydiff":
        utility = 2 * utility - 1
    attention = rng.random((LAYERS, HEADS, PROMPT)).astype(np.float32)
    attention /= attention.sum(2, keepdims=True)
    once, again = np.full((LAYERS, HEADS), 24), np.full((LAYERS, HEADS), 25)
    if dealing != "equal":
        once = BLOCK * np.array([[1, 6], [4, 1], [3, 3]])
        again = BLOCK * np.array([[3, 8], [2, 1], [1, 3]])
    flat = utility.reshape(-1, PROMPT)
    first = compaction(2, survivors(flat, once), PROMPT, PROMPT, scorer, dealing)
    later = [rng.random(count + 16).astype(np.float32) for count in once.ravel()]
    second = compaction(18, survivors(later, again), 40, PROMPT + 16, scorer, dealing)
    levels = {2: 24, 18: int(again.mean())}
    steps, logical, resident = [], 0, 0
    for number, new in enumerate([60, 60] + [1] * 20):
        resident = levels.get(number, resident) + new
        logical += new
        steps.append(
            Step(
                kind="prefill" if number < 2 else "compaction" if number in levels else "decode",
                new_tokens=new,
                logical_tokens=logical,
                resident_tokens=resident,
                logical_bytes=logical * TOKEN_BYTES,
                tier_bytes={"hot": resident * TOKEN_BYTES},
                blocks=-(-resident // BLOCK),
            )
        )
    return Recording(steps, [first, second], utility, attention, [1] * 21, {"compactions": 2})


def make(scorer: str = "tova", dealing: str = "equal", **facts: Any) -> Profile:
    engine = {
        "block_tokens": BLOCK,
        "block_bytes": BLOCK * TOKEN_BYTES,
        "vllm": "0",
        "device": "cpu",
        "policy": {**policy_of({"scorer": scorer, "dealing": dealing}).to_json_dict(), "keep_ratio": 0.2},
        "comparable_scores": False,
        "calibration": None if dealing == "equal" else "0123",
        **facts,
    }
    prompt = {"source": "--text", "tokens": PROMPT, "marks": [{"name": "fact", "start": 50, "stop": 55}]}
    return assemble(recording(scorer, dealing), engine, prompt, {"model": "toy"})


# ---- pure functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distinct", [1000, 3])
def test_one_ranking_over_all_heads_against_brute_force(distinct: int) -> None:
    utility = np.random.default_rng(1).integers(0, distinct, (3, 2, 30)).astype(np.float32)
    held = deal(utility, 10, SINKS, RECENT)
    entries = [(layer, head, token) for layer in range(3) for head in range(2) for token in range(30)]
    free = [e for e in entries if SINKS <= e[2] < 30 - RECENT]
    free.sort(key=lambda e: (-utility[e], -e[2], e[0], e[1]))
    expected = {e for e in entries if e not in free} | set(free[: 3 * 2 * (10 - SINKS - RECENT)])
    assert {tuple(e) for e in np.argwhere(held)} == expected
    assert held.sum() == 3 * 2 * 10


def test_dealing_moves_memory_to_the_head_that_needs_it() -> None:
    utility = np.zeros((2, 1, 20), dtype=np.float32)
    utility[1] = 1
    assert deal(utility, 10, 1, 1).sum(2).tolist() == [[2], [18]]
    assert deal(np.where(utility == 1, np.nan, utility), 10, 1, 1).sum(2).tolist() == [[18], [2]]


def test_dealing_needs_room_for_the_protected() -> None:
    with pytest.raises(ValueError, match=r"keep must be 6 \(protected\) to 20 \(resident\), got 5"):
        deal(np.zeros((1, 1, 20)), 5, 2, 4)


def test_one_ranking_holds_the_most_utility_of_all_ways_with_equal_memory() -> None:
    made = recording()
    dealt = deal(made.utility, 24, SINKS, RECENT)
    equal = made.compactions[0].survivors.mask(PROMPT)
    assert dealt.sum() == equal.sum()
    assert made.utility[dealt].sum() > made.utility[equal].sum()


@pytest.mark.parametrize("distinct", [1000, 3])
def test_the_equal_split_is_the_engines_choice(distinct: int) -> None:
    utility = np.random.default_rng(1).integers(0, distinct, (3, 2, 30)).astype(np.float32)
    utility[0, 0, ::3] = np.nan
    held = equal_split(utility, 10, SINKS, RECENT)
    chosen = survivors(utility.reshape(-1, 30), np.full((3, 2), 10))
    assert np.array_equal(held, chosen.mask(30))
    with pytest.raises(ValueError, match="got 31"):
        equal_split(utility, 31, SINKS, RECENT)


def test_held_mass() -> None:
    weights = np.array([[[1.0, 2.0, 5.0]], [[0.0, 0.0, 0.0]]])
    held = np.array([[[True, False, True]], [[False, False, True]]])
    assert held_mass(weights, held).tolist() == [[0.75], [1.0]]
    with pytest.raises(ValueError, match="weights >= 0"):
        held_mass(-weights, held)


def test_ranks_within_a_head() -> None:
    ranks = rank_in_head(np.array([[[5.0, 1.0, 3.0]], [[2.0, 2.0, 9.0]]]))
    assert ranks.tolist() == [[[1.0, 0.0, 0.5]], [[0.25, 0.25, 1.0]]]


@pytest.mark.parametrize("tokens", [1, 7, 8192])
def test_bins_hold_every_token_once(tokens: int) -> None:
    values = np.random.default_rng(0).random((2, tokens))
    width = bin_width(tokens, 100)
    assert -(-tokens // width) <= 100
    parts = [values[:, i : i + width] for i in range(0, tokens, width)]
    assert np.allclose(bin_tokens(values, width, "mean"), np.stack([p.mean(1) for p in parts], 1))
    assert np.array_equal(bin_tokens(values, width, "max"), np.stack([p.max(1) for p in parts], 1))


@pytest.mark.parametrize("dealing", ["equal", "global"])
def test_survivors_are_followed_through_compactions(dealing: str) -> None:
    made = recording(dealing=dealing)
    before = lengths_before(made.compactions)
    first, second = positions_after(made.compactions)
    assert (before[0] == PROMPT).all()
    for at in np.ndindex(LAYERS, HEADS):
        assert np.array_equal(first[at], made.compactions[0].survivors[at])
        resident = [*first[at], *range(PROMPT, PROMPT + 16)]
        assert len(resident) == before[1][at]
        assert second[at].tolist() == [resident[i] for i in made.compactions[1].survivors[at]]
    assert (len({*first.counts.ravel()}) > 1) == (dealing == "global")


def test_survivors_that_do_not_follow_are_refused() -> None:
    first, second = recording().compactions
    wrong = replace(second, facts={**second.facts, "resident_before": 41})
    with pytest.raises(ValueError, match="started from 41 resident tokens, but 40 follow"):
        positions_after([first, wrong])
    beyond = Ragged(second.survivors.values + 1, second.survivors.counts)
    with pytest.raises(ValueError, match="beyond the tokens that its head had"):
        positions_after([first, replace(second, survivors=beyond)])


def test_ragged_lists() -> None:
    pairs = [[[0, 2], [1]], [[], [3, 4, 5]]]
    made = Ragged.of(pairs)
    assert made.counts.tolist() == [[2, 1], [0, 3]]
    assert [[head.tolist() for head in layer] for layer in made.layers()] == pairs
    assert made[1, 1].tolist() == [3, 4, 5]
    assert made.of_these(Ragged.of([[[1], [0]], [[], [0, 2]]])).values.tolist() == [2, 1, 3, 5]
    longer = made.followed_by(6, 8)
    assert longer[1, 0].tolist() == [6, 7] and longer[0, 0].tolist() == [0, 2, 6, 7]
    assert np.argwhere(made.mask(6)).tolist() == [[0, 0, 0], [0, 0, 2], [0, 1, 1], [1, 1, 3], [1, 1, 4], [1, 1, 5]]
    with pytest.raises(ValueError, match="add up to 6, not 5 values"):
        Ragged(made.values[:5], made.counts)


# ---- packing and JSON --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [[], [0], [9], [0, 1, 2], [3, 4, 9], list(range(10))])
def test_run_lengths(index: list[int]) -> None:
    lengths = run_lengths(np.array(index, dtype=int), 10)
    assert sum(lengths) == 10
    assert from_run_lengths(lengths).tolist() == index
    assert run_lengths(np.array([3, 4, 9]), 10) == [3, 2, 4, 1]


def test_a_mass_is_coded_on_a_logarithmic_scale_and_a_cosine_on_a_linear_one() -> None:
    rng = np.random.default_rng(0)
    mass = (10 ** -rng.uniform(0, 6, (2, 3, 500))).astype(np.float32)
    cosine = rng.uniform(-1, 1, (2, 3, 500)).astype(np.float32)
    scales = utility_scale(mass), utility_scale(cosine)
    assert [scale["kind"] for scale in scales] == ["log", "linear"]
    assert np.allclose(from_codes(to_codes(mass, scales[0]), scales[0]), mass, rtol=0.01)
    assert np.allclose(from_codes(to_codes(cosine, scales[1]), scales[1]), cosine, atol=0.0011)


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0, 3.0], [0.0, 0.0, 0.0, 7.0], [np.nan, -np.inf, 1.0, 2.0, np.inf]])
def test_utilities_without_a_spread_or_a_number_are_coded(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    scale = utility_scale(array)
    codes = to_codes(array, scale)
    assert codes.min() >= 0 and codes.max() <= 999
    finite = np.isfinite(array)
    assert np.allclose(from_codes(codes, scale)[finite], array[finite], atol=1e-6)


@pytest.mark.parametrize("dealing", ["equal", "global"])
def test_json_round_trip(tmp_path: Path, dealing: str) -> None:
    made = make(dealing=dealing)
    write_profile(made, tmp_path / "profile.json")
    read = read_profile(tmp_path / "profile.json")
    assert read.to_json() == made.to_json()
    assert np.array_equal(read.held_at_end, made.held_at_end)
    for one, other in zip(read.compactions, made.compactions, strict=True):
        assert np.array_equal(one.survivors.values, other.survivors.values)
        assert np.array_equal(one.survivors.counts, other.survivors.counts)
    assert np.array_equal(read.utility, made.utility)


def test_size_at_8k_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    utility = (10 ** -rng.uniform(0, 6, (30, 3, 8192))).astype(np.float32)
    small = recording()
    index = survivors(utility.reshape(-1, 8192), np.full((30, 3), 819))
    only = compaction(2, index, 8192, 8192, "tova", "equal")
    big = replace(small, utility=utility, attention=utility, compactions=[only], steps=small.steps[:3])
    facts = {"block_tokens": BLOCK, "policy": {}}
    write_profile(assemble(big, facts, {"marks": []}, {}), tmp_path / "profile.json")
    assert (tmp_path / "profile.json").stat().st_size < 4_000_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        ("{", "is no JSON"),
        ("[]", "is no profile"),
        ('{"format": "deltamem-profile", "version": 99}', "has version 99, this deltamem reads 2"),
        ('{"format": "deltamem-profile", "version": 2}', "is damaged .KeyError: 'steps'"),
    ],
)
def test_a_file_that_is_no_profile_is_explained(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ProfileError, match=message):
        read_profile(path)


# ---- what is reported --------------------------------------------------------------------------------------------


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
    held = np.zeros((2, 2, 10), dtype=bool)
    held[0, 0, 3:6] = held[1, 1, 5] = True
    found = mark_kept({"name": "x", "start": 3, "stop": 6}, held)
    assert (found.tokens, found.whole, found.part) == (3, 1, 1)
    assert found.share == pytest.approx(4 / 12)


def test_every_built_in_scorer_says_whether_its_utilities_compare() -> None:
    found = {name: meaning_of(name).comparable for name in BUILTIN}
    assert found == {
        "tova": "yes", "snapkv": "yes", "delta": "partly", "predictor": "yes", "distinct": "yes", "keydiff": "no",
        "streaming": "no", "random": "no",
    }  # fmt: skip
    # A scorer whose scores the engine deals pages by must be one whose scores compare.
    dealt_by = {name for name, scorer in available_scorers().items() if scorer.comparable}
    assert {found[name] for name in dealt_by & BUILTIN.keys()} <= {"yes"}
    assert meaning_of("tova").ranking == "by_utility"
    assert meaning_of("keydiff").ranking == meaning_of("of another package").ranking == "by_attention"


@pytest.mark.parametrize("dealing", ["equal", "global"])
@pytest.mark.parametrize("scorer", ["tova", "keydiff"])
def test_drawing_again_from_the_json(tmp_path: Path, scorer: str, dealing: str) -> None:
    write_profile(make(scorer, dealing), tmp_path / "profile.json")
    result = invoke("--from", tmp_path / "profile.json", "--out", tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    printed = " ".join(result.stdout.split())
    assert "120 to 24 tokens" + (" on average" if dealing != "equal" else "") in printed
    assert ("1 / 3 / 6 of 15 (lowest, median, highest)" in printed) == (dealing != "equal")
    assert ("dealt by the model's calibration" in printed) == (dealing != "equal")
    assert ("if shares were equal" in printed) == (dealing != "equal")
    assert "fact (5 tokens)" in result.stdout
    assert ("compare between heads: no" in printed) == (scorer == "keydiff" and dealing == "equal")
    assert ("retained utility" in printed) == (scorer == "tova")
    for name in ("utility", "kept", "pages", "bytes", "shares", "overview"):
        with Image.open(tmp_path / "pictures" / f"{name}.png") as picture:
            assert picture.width == (1920 if name == "overview" else 1600)
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 20


# ---- prompts and errors ------------------------------------------------------------------------------------------


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


LONG = "word " * 400


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
    result = invoke(*arguments)
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
