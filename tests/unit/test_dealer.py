# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A dealer rates a request once for a probe and the compaction behind it, and heads together or apart alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltamem_vllm.dealing import dealer as module
from deltamem_vllm.dealing import rater as rating
from deltamem_vllm.dealing.dealer import Dealer
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.prior import HeadPrior
from deltamem_vllm.dealing.rater import Rater, _rated_together
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.memory.plans import CompactionPlan, Probe
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.scoring.base import Scorer, ScoreView

LAYERS, HEADS, SIZE, DIM = 3, 2, 8, 4
FIRST = tuple(range(12))
SECOND = tuple(range(20, 26))
THIRD = tuple(range(40, 43))


class KeyLength(Scorer):
    """Long keys matter; counts what it is asked."""

    name = "key-length"
    summary = "for this test"
    source = "this test"
    comparable = True

    def __init__(self) -> None:
        self.tokens = 0

    def score(self, view: ScoreView) -> Tensor:
        self.tokens += view.num_kv_heads * view.num_resident
        # The mean makes scores depend on which tokens are rated together: those of one head, and no padding.
        return view.keys_f32.norm(dim=2) + view.values_f32.mean((1, 2)).unsqueeze(1)


def make_dealer(seed: int = 0, prior: HeadPrior | None = None) -> Dealer:
    torch.manual_seed(seed)
    memory = torch.randn(LAYERS, 64, HEADS, SIZE, 2 * DIM) * torch.rand(LAYERS, 1, HEADS, 1, 1)
    pool = PagePool(list(memory))
    tables = PageTables(pool, max_rows=2, max_width=64, fixed=False)
    mover = DealtPages(make_layout("slot_major", SIZE, DIM))
    return Dealer(tables, mover, Rater(tables, mover, [1.0] * LAYERS, None, 0.0, 0, None), prior)


def plan(source: tuple[int, ...], target: tuple[int, ...], resident: int, serial: int) -> CompactionPlan:
    keep = len(target) * SIZE
    return CompactionPlan(
        "r", source, target, target, resident, keep, 100, 100 - resident, 100 - keep, 2, 3, "key-length", "global",
        serial, in_place=False,
    )  # fmt: skip


def probe_before(compaction: CompactionPlan, compacted_next: bool) -> Probe:
    return Probe(
        "r", compaction.source_blocks, compaction.resident_before, compaction.logical_len, 2, 3, "key-length",
        "global", compacted_next=compacted_next,
    )  # fmt: skip


@pytest.mark.parametrize("compacted_next", [True, False])
def test_a_probe_before_a_compaction_changes_nothing_but_the_work(compacted_next: bool) -> None:
    plain, probed = make_dealer(), make_dealer()
    for step in (plan(FIRST, SECOND, 93, 1), plan((*SECOND, 30), THIRD, 6 * SIZE + 5, 2)):
        alone, both = KeyLength(), KeyLength()
        expected = plain.run(step, alone)
        probed.probe(probe_before(step, compacted_next), both)
        assert torch.equal(probed.run(step, both).hot, expected.hot)
        assert both.tokens == (1 if compacted_next else 2) * alone.tokens
    lengths = plain.tables.requests["r"].counts
    assert lengths.unique().numel() > 1, "heads of different lengths are what this is about"
    assert torch.equal(plain.tables.pool.pages, probed.tables.pool.pages)


def test_ratings_are_used_once() -> None:
    dealer, scorer = make_dealer(), KeyLength()
    step = plan(FIRST, SECOND, 93, 1)
    dealer.probe(probe_before(step, compacted_next=True), scorer)
    dealer.run(step, scorer)
    rated = scorer.tokens
    dealer.run(plan((*SECOND, 30), THIRD, 6 * SIZE + 5, 2), scorer)
    assert scorer.tokens > rated


def test_more_ratings_than_may_be_kept_are_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_RATED", LAYERS * HEADS * 93 - 1)
    dealer, scorer = make_dealer(), KeyLength()
    step = plan(FIRST, SECOND, 93, 1)
    dealer.probe(probe_before(step, compacted_next=True), scorer)
    dealer.run(step, scorer)
    assert scorer.tokens == 2 * LAYERS * HEADS * 93


def test_heads_are_rated_apart_where_they_would_not_fit_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    step = plan(FIRST, SECOND, 93, 1)
    together = make_dealer().run(step, KeyLength())
    assert together.cold is None
    monkeypatch.setattr(rating, "_NUMBERS_IN_CACHE", 93 * DIM)
    assert torch.equal(make_dealer().run(step, KeyLength()).hot, together.hot)


@pytest.mark.parametrize("over_heads", [True, False])
def test_scores_over_heads_are_given_all_that_are_alike(monkeypatch: pytest.MonkeyPatch, over_heads: bool) -> None:
    """A mean over the heads of a layer may not depend on how many of them fit a cache."""
    monkeypatch.setattr(rating, "_NUMBERS_IN_CACHE", 1)
    views: list[int] = []

    class Counting(KeyLength):
        def score(self, view: ScoreView) -> Tensor:
            views.append(view.num_kv_heads)
            return super().score(view)

    Counting.over_heads = over_heads
    make_dealer().run(plan(FIRST, SECOND, 93, 1), Counting())
    assert views == ([HEADS] * LAYERS if over_heads else [1] * LAYERS * HEADS)


def test_runs_of_heads() -> None:
    def runs(tokens: list[int], width: int) -> list[tuple[int, int]]:
        return [(run.start, run.stop) for run in _rated_together(tokens, width, one_by_one=False)]

    assert runs([5, 5, 7, 7, 7, 5], 0) == [(0, 2), (2, 5), (5, 6)]
    assert runs([1 << 14] * 3, 2) == [(0, 2), (2, 3)]
    assert runs([1 << 20] * 2, 64) == [(0, 1), (1, 2)], "one head at least"
    assert runs([1 << 20] * 2, 0) == [(0, 2)], "a GPU takes all"
    apart = [(run.start, run.stop) for run in _rated_together([5, 5, 7], 0, one_by_one=True)]
    assert apart == [(0, 1), (1, 2), (2, 3)]


def test_a_rating_of_other_blocks_is_not_used() -> None:
    """Were a probed compaction not carried out, its ratings must not choose what a later one keeps."""
    plain, probed = make_dealer(), make_dealer()
    step = plan((*FIRST, 30), SECOND, 97, 1)
    probed.probe(probe_before(plan(FIRST, SECOND, 93, 1), compacted_next=True), KeyLength())
    alone, again = KeyLength(), KeyLength()
    assert torch.equal(probed.run(step, again).hot, plain.run(step, alone).hot)
    assert again.tokens == alone.tokens


class Unusual(Scorer):
    """What differs from all that was seen matters, once and for all; counts what it is asked."""

    name = "unusual"
    summary = "for this test"
    source = "this test"
    comparable = True
    lasting = True

    def __init__(self) -> None:
        self.tokens = 0
        self.given: list[Tensor] = []

    def score(self, view: ScoreView) -> Tensor:
        assert view.seen is not None
        self.tokens += view.num_kv_heads * view.num_resident
        usual = view.seen.values / view.seen.count
        scores = (view.values_f32 - usual.unsqueeze(1)).norm(dim=2) + (view.keys_f32 @ view.seen.directions[..., None])[
            ..., 0
        ].abs()
        self.given.append(scores)
        return scores


def test_lasting_scores_stay_with_their_entries() -> None:
    dealer, scorer = make_dealer(), Unusual()
    first, second = plan(FIRST, SECOND, 93, 1), plan((*SECOND, 30), THIRD, 6 * SIZE + 5, 2)
    pages, _ = dealer.tables.source("r", FIRST, 93)
    whole = [dealer._mover.read(dealer.tables.pool.flat, pages[layer], 93) for layer in range(LAYERS)]
    kept = dealer.run(first, scorer).hot
    assert scorer.tokens == LAYERS * HEADS * 93
    rated = dealer.tables.requests["r"].rated
    assert rated is not None and rated.seen.count == 93
    for layer, given in enumerate(scorer.given):
        for head in range(HEADS):
            own = given[head][kept[layer, head]]
            assert torch.equal(rated.scores[layer, head, : len(own)], own)
            assert rated.scores[layer, head, len(own) :].eq(-torch.inf).all()
        torch.testing.assert_close(rated.seen.values[layer], whole[layer][1].float().sum(1))
        unit = torch.nn.functional.normalize(whole[layer][0].float(), dim=-1)
        torch.testing.assert_close(rated.seen.directions[layer], unit.sum(1))
    tail_pages = dealer.tables.pool.ids(torch.tensor([30]))
    tail = [dealer._mover.read(dealer.tables.pool.flat, tail_pages[layer], 5) for layer in range(LAYERS)]
    before, scorer.given, scorer.tokens = rated, [], 0
    kept = dealer.run(second, scorer).hot
    assert scorer.tokens == LAYERS * HEADS * 5, "what stayed is not rated again"
    rated = dealer.tables.requests["r"].rated
    assert rated is not None and rated.seen.count == 98
    for layer, given in enumerate(scorer.given):
        torch.testing.assert_close(
            rated.seen.values[layer], whole[layer][1].float().sum(1) + tail[layer][1].float().sum(1)
        )
        for head in range(HEADS):
            old = before.scores[layer, head]
            every = torch.cat([old[old > -torch.inf], given[head]])
            own = every[kept[layer, head][: len(every)]]
            assert torch.equal(rated.scores[layer, head, : len(own)], own)


class Unprofiled(KeyLength):
    """As it is, whatever the model's calibration says."""

    profiled = False


def test_a_scorer_may_be_judged_by_itself() -> None:
    step = plan(FIRST, SECOND, 93, 1)
    profile = torch.rand(LAYERS, HEADS, 16).sort(-1, descending=True).values * torch.rand(LAYERS, HEADS, 1)
    alone, kept = make_dealer().run(step, KeyLength()).hot, {}
    prior = HeadPrior(profile)
    for scorer in (KeyLength(), Unprofiled()):
        kept[scorer.profiled] = make_dealer(prior=prior).run(step, scorer).hot
        if not scorer.profiled:  # where the profile alone deals, it deals for every scorer
            only = replace(step, dealing="profile")
            by_profile = [make_dealer(prior=prior).run(only, one).hot for one in (KeyLength(), Unprofiled())]
            assert torch.equal(*by_profile)
    assert torch.equal(kept[False], alone)
    assert not torch.equal(kept[True], alone)


def test_scores_of_another_scorer_are_not_taken_over() -> None:
    dealer, other = make_dealer(), KeyLength()
    dealer.run(plan(FIRST, SECOND, 93, 1), other)
    assert dealer.tables.requests["r"].rated is None
    dealer = make_dealer()
    dealer.run(plan(FIRST, SECOND, 93, 1), Unusual())
    other.tokens = 0
    dealer.run(plan((*SECOND, 30), THIRD, 6 * SIZE + 5, 2), other)
    assert other.tokens == LAYERS * HEADS * (6 * SIZE + 5), "all of it is rated anew"
    assert dealer.tables.requests["r"].rated is None
