# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Scores of tokens in their pages: every native version against the slow definitions and the torch scorers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltamem_vllm.ops import native
from deltamem_vllm.ops.inputs_utility import UtilityCase, make_utility
from deltamem_vllm.ops.page_utility import OlderTokens, feature_scores, page_utility, window_attention
from deltamem_vllm.scoring import reference
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.predictor import PredictorScorer
from deltamem_vllm.scoring.registry import load_scorer
from deltamem_vllm.scoring.seen import Seen
from tests.support.examples import examples

ISAS = native.supported_isas()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("slot_major", "keys_transposed")
BF16, FP32 = torch.bfloat16, torch.float32

KINDS: dict[str, Callable[..., Tensor]] = {
    "delta": lambda case, **more: page_utility(*case.window, **more)[0],
    "tova": lambda case, **more: window_attention(case.queries[:, :, -1:].contiguous(), *case.window[1:], **more),
    "snapkv": lambda case, **more: window_attention(*case.window, pooled=True, **more),
    "predictor": lambda case, **more: feature_scores("predictor", *case.pages, weights=case.weights, **more)[0],
    "distinct": lambda case, **more: feature_scores("distinct", *case.pages, **more)[0],
    "keydiff": lambda case, **more: feature_scores("keydiff", *case.pages, **more)[0],
}
# float32 sums in another order, of the moves also a difference of squares. Cosines near 0 cancel.
ALLOWED = {"delta": (1e-4, 2e-5), "keydiff": (1e-4, 2e-6)}


def view_of(case: UtilityCase, s: int) -> ScoreView:
    """One sequence, token by token: what a scorer is shown of it."""
    count, size = int(case.seq_lens[s]), case.hot.block_size
    index = torch.arange(count)
    page = case.block_table[s, index // size].long().unsqueeze(1)
    keys, values = (case.pool[page, part[index % size]].unsqueeze(0) for part in (case.hot.keys, case.hot.values))
    queries = case.queries[s][:, -count:]
    return ScoreView(keys, values, queries, case.scale)


def scorer_of(kind: str, case: UtilityCase, s: int):
    scorer = load_scorer(kind)
    if isinstance(scorer, PredictorScorer):
        scorer.bind(case.weights[s].view(1, 1, -1))
    return scorer


def slow(kind: str, case: UtilityCase, s: int) -> Tensor:
    if kind == "predictor":
        return reference.predictor(view_of(case, s), case.weights[s].view(1, 1, -1))[0]
    return getattr(reference, kind)(view_of(case, s))[0]


def check(kind: str, case: UtilityCase, expected: Callable[[str, UtilityCase, int], Tensor]) -> None:
    rtol, atol = ALLOWED.get(kind, (2e-5, 1e-6))
    for name in ISAS:
        with native.using_isa(name):
            got = KINDS[kind](case)
        assert got.shape == (len(case.seq_lens), case.block_table.shape[1] * case.hot.block_size)
        for s, count in enumerate(case.seq_lens.tolist()):
            assert not got[s, count:].any()
            if count:
                torch.testing.assert_close(
                    got[s, :count].double(), expected(kind, case, s).double(), rtol=rtol, atol=atol, msg=f"{name} {s}"
                )


def test_there_are_native_versions_to_compare() -> None:
    assert "scalar" in ISAS


@settings(max_examples=examples(40), deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    dim=st.sampled_from([1, 2, 7, 8, 16, 20, 33]),
    block=st.sampled_from([1, 3, 8, 16, 32]),
    group=st.integers(1, 3),
    window=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 24), min_size=1, max_size=3),
    peaked=st.sampled_from([1.0, 8.0]),
    seed=st.integers(0, 2**16),
)
def test_scores_are_the_definition(kind, layout, dtype, dim, block, group, window, lengths, peaked, seed):
    check(kind, make_utility(layout, dtype, dim, block, group, window, lengths, peaked=peaked, seed=seed), slow)


@pytest.mark.parametrize("kind", ["keydiff", "distinct", "predictor"])
def test_keys_that_cancel_out_have_no_mean_direction(kind: str) -> None:
    case = make_utility("slot_major", torch.bfloat16, 1, 3, 1, 1, [2], peaked=1.0, seed=0)
    keys = view_of(case, 0).keys.flatten()
    assert keys[0] * keys[1] < 0, "one dimension, opposite signs"
    check(kind, case, slow)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layout", "dtype", "dim", "block", "group", "window", "lengths", "peaked"),
    [
        ("keys_transposed", BF16, 64, 32, 3, 8, (300, 64, 65, 63), 1.0),
        ("keys_transposed", torch.float16, 128, 16, 4, 9, (130, 200), 1.0),  # more than one block of rows
        ("slot_major", FP32, 80, 48, 1, 2, (97, 500), 8.0),
        ("slot_major", BF16, 96, 128, 16, 3, (129, 12), 1.0),
        ("keys_transposed", FP32, 256, 20, 8, 1, (70, 1), 30.0),
    ],
)
def test_long_sequences_are_what_torch_says(kind, layout, dtype, dim, block, group, window, lengths, peaked):
    """Lengths at which the slow definitions would take minutes, with tiles and blocks of rows that are not full."""
    case = make_utility(layout, dtype, dim, block, group, window, lengths, peaked=peaked, seed=dim)

    def torchs(kind: str, case: UtilityCase, s: int) -> Tensor:
        return scorer_of(kind, case, s).score(view_of(case, s))[0]

    check(kind, case, torchs)


@pytest.mark.parametrize("gap", [10.0, 30.0, 200.0, 600.0])
def test_a_token_with_nearly_all_weight_is_kept_apart(gap):
    """Its weight is 1 - exp(-gap): dividing what is left by that would be rounding noise by rounding noise."""
    case = make_utility("keys_transposed", FP32, 8, 16, 2, 3, (40,), peaked=0.01, seed=1)
    query = case.queries[0, 0, 0]
    page, slot = int(case.block_table[0, 1]), 5
    case.pool[page, case.hot.keys[slot]] = gap * query / query.square().sum() / case.scale
    check("delta", case, slow)


def test_pages_are_summed_up():
    case = make_utility("keys_transposed", BF16, 64, 16, 3, 4, (70, 33, 0))
    scores, sums = page_utility(*case.window)
    torch.testing.assert_close(sums, scores.view(3, -1, 16).sum(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_repetition_change_no_bit(kind):
    case = make_utility("keys_transposed", BF16, 64, 32, 3, 4, (900, 33, 700, 64))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(KINDS[kind](case))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["key", "value", "query"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_own_sequence_only(kind, what, number):
    case = make_utility("keys_transposed", FP32, 16, 16, 2, 3, (80, 40))
    clean = KINDS[kind](case)
    page = int(case.block_table[0, 1])
    if what == "query":
        case.queries[0, 1, 2, 3] = number
    else:
        case.pool[page, getattr(case.hot, f"{what}s")[5, 3]] = number
    by_window = kind in ("delta", "tova", "snapkv") and (what != "value" or kind == "delta")
    torchs = scorer_of(kind, case, 0).score(view_of(case, 0))[0]
    for name in ISAS:
        with native.using_isa(name):
            got = KINDS[kind](case)
        torch.testing.assert_close(got[1], clean[1], rtol=1e-4, atol=1e-5)
        if by_window:
            assert got[0, :80].isnan().all()
        else:  # by the formula, as in torch
            torch.testing.assert_close(got[0, :80], torchs, rtol=1e-4, atol=1e-5, equal_nan=True)


@settings(max_examples=examples(15), deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    first=st.integers(1, 100),
    then=st.integers(1, 100),
    name=st.sampled_from(ISAS or ("none",)),
    seed=st.integers(0, 2**16),
)
def test_what_was_seen_before_counts(layout, dtype, first, then, name, seed):
    case = make_utility(layout, dtype, 24, 16, 1, 1, (first, then), seed=seed)
    views = [view_of(case, s) for s in range(2)]
    earlier = Seen.of(views[0].keys, views[0].values)
    before = tuple(part.expand(2, -1) for part in (earlier.directions, earlier.values))
    with native.using_isa(name):
        scores, directions, values = feature_scores(
            "predictor", *case.pages, weights=case.weights, before=(*before, earlier.count)
        )
    whole = earlier + Seen.of(views[1].keys, views[1].values)
    torch.testing.assert_close(directions[1:], whole.directions, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(values[1:], whole.values, rtol=1e-5, atol=1e-4)
    view = ScoreView(views[1].keys, views[1].values, None, 1.0, seen=whole)
    expected = scorer_of("predictor", case, 1).score(view)[0]
    torch.testing.assert_close(scores[1, :then], expected, rtol=2e-5, atol=1e-6)


def test_a_score_of_the_wrong_token_is_seen():
    """The control of the comparisons above."""
    case = make_utility("keys_transposed", BF16, 64, 32, 3, 4, (100,))
    for kind, call in KINDS.items():
        got, rtol = call(case)[0, :100].roll(1), ALLOWED.get(kind, (2e-5, 1e-6))
        assert not torch.allclose(got, scorer_of(kind, case, 0).score(view_of(case, 0))[0], *rtol), kind


class TestRefusals:
    def test_what_the_library_cannot_do_is_left_to_torch(self, monkeypatch):
        tiled = make_utility("tiled", FP32, 8, 16, 1, 1, (5,))
        double = make_utility("slot_major", torch.float64, 8, 16, 1, 1, (5,))
        wide = make_utility("slot_major", FP32, 264, 16, 1, 1, (5,))
        for case in (tiled, double, wide):
            assert page_utility(*case.window) is None and window_attention(*case.window) is None
            assert feature_scores("keydiff", *case.pages) is None
        monkeypatch.setattr(native, "library", lambda: None)
        assert page_utility(*make_utility("slot_major", FP32, 8, 16, 1, 1, (5,)).window) is None

    @pytest.mark.parametrize(
        ("place", "broken", "says"),
        [
            (0, lambda q: q[0], "queries must be"),
            (0, lambda q: q[:, :, :, :4], "queries must be"),
            (0, lambda q: q[:, :0], "queries must be"),
            (0, lambda q: q.half(), "queries must be contiguous"),
            (0, lambda q: q.transpose(1, 2), "queries must be contiguous"),
            (1, lambda p: p[:, :64], "the pool must be"),
            (3, lambda t: t.long(), "block_table must be int32"),
            (3, lambda t: t[:1], "block_table must be int32"),
            (3, lambda t: t * 0 + 10**6, "a page outside the pool"),
            (3, lambda t: t * 0 - 1, "a page outside the pool"),
            (4, lambda n: n.long(), "seq_lens must be int32"),
            (4, lambda n: n + 100, "sequence 0 has a length that does not fit its pages: 120 tokens in a table of 2"),
            (4, lambda n: -n, "a length that does not fit"),
        ],
    )
    def test_mistakes(self, place, broken, says):
        case = make_utility("slot_major", FP32, 8, 16, 2, 3, (20, 7))
        arguments = list(case.window)
        arguments[place] = broken(arguments[place])
        with pytest.raises(ValueError, match=says):
            page_utility(*arguments)
        with pytest.raises(ValueError, match=says):
            window_attention(*arguments)
        if place:
            with pytest.raises(ValueError, match=says):
                feature_scores("distinct", *arguments[1:5])

    @pytest.mark.parametrize(
        ("kind", "more", "says"),
        [
            ("predictor", {}, "without weights"),
            ("distinct", {"weights": torch.zeros(2, 25)}, "with weights"),
            ("delta", {}, "one of predictor, distinct, keydiff"),
            ("predictor", {"weights": torch.zeros(2, 24)}, r"weights must be float32 \(2, 25\)"),
            ("distinct", {"before": (torch.zeros(2, 8), torch.zeros(1, 8), 3)}, "what was seen before must be"),
        ],
    )
    def test_mistakes_in_features(self, kind, more, says):
        case = make_utility("slot_major", FP32, 8, 16, 1, 1, (20, 7))
        with pytest.raises(ValueError, match=says):
            feature_scores(kind, *case.pages, **more)


@settings(max_examples=examples(25), deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    counts=st.lists(st.tuples(st.sampled_from([0, 1, 5, 63, 64, 90]), st.integers(1, 100)), min_size=1, max_size=3),
    window=st.integers(1, 4),
    name=st.sampled_from(ISAS or ("none",)),
    seed=st.integers(0, 2**16),
)
def test_older_tokens_count_as_if_they_stood_in_pages(kind, layout, dtype, counts, window, name, seed):
    """The same tokens, all in pages, or their first some apart."""
    older, hot = zip(*counts, strict=True)
    whole = make_utility(layout, dtype, 20, 16, 2, window, [a + b for a, b in counts], seed=seed)
    views = [view_of(whole, s) for s in range(len(counts))]
    rest = make_utility(layout, dtype, 20, 16, 2, window, hot, seed=seed)
    for s, view in enumerate(views):
        index = torch.arange(hot[s])
        page = rest.block_table[s, index // 16].long().unsqueeze(1)
        for part, numbers in ((rest.hot.keys, view.keys), (rest.hot.values, view.values)):
            rest.pool[page, part[index % 16]] = numbers[0, older[s] :]
    before = OlderTokens(
        *(torch.cat([part[0, :n] for part, n in zip(parts, older, strict=True)]) for parts in (
            [view.keys for view in views], [view.values for view in views]
        )),
        torch.tensor(older),
    )  # fmt: skip
    rest = replace(rest, queries=whole.queries, weights=whole.weights)
    with native.using_isa(name):
        expected, got = KINDS[kind](whole), KINDS[kind](rest, older=before)
    assert got.shape[1] == max(older) + rest.block_table.shape[1] * 16
    rtol, atol = ALLOWED.get(kind, (2e-5, 1e-6))
    for s, (a, b) in enumerate(counts):
        torch.testing.assert_close(got[s, : a + b], expected[s, : a + b], rtol=rtol, atol=atol)
        assert not got[s, a + b :].any()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (OlderTokens(torch.zeros(3, 8), torch.zeros(3, 8), torch.tensor([3])), r"must be int64 \(2,\)"),
        (OlderTokens(torch.zeros(3, 8), torch.zeros(3, 8), torch.tensor([4, -1])), "0 or more older tokens, got -1"),
        (OlderTokens(torch.zeros(3, 8), torch.zeros(3, 8), torch.tensor([1, 3])), "keys of older tokens must be"),
        (OlderTokens(torch.zeros(3, 8), torch.zeros(3, 8).half(), torch.tensor([1, 2])), "values of older tokens"),
    ],
)
def test_older_tokens_that_do_not_fit_are_refused(broken, says):
    case = make_utility("slot_major", FP32, 8, 16, 2, 3, (20, 7))
    with pytest.raises(ValueError, match=says):
        page_utility(*case.window, older=broken)
