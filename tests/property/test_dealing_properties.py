# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What holds for every dealing of pages, whatever the scores, the lengths and the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltamem_vllm.dealing import reference
from deltamem_vllm.dealing.deal import RankedPages, curve, deal, page_utilities, survivors

QUICK = settings(max_examples=120, deadline=None)


@dataclass(frozen=True)
class Case:
    """A request: its scores, and what the scheduler decided."""

    scores: Tensor
    lengths: Tensor
    block_size: int
    sink: int
    recent: int
    budget: int

    @property
    def floor(self) -> int:
        return max(1, -(-(self.sink + self.recent) // self.block_size))

    def rank(self) -> RankedPages:
        return page_utilities(self.scores, self.lengths, self.block_size, self.sink, self.recent)


# Few values: ties are what breaks an order. Sums of a handful of them are exact in float32.
MASSES = [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 3.0, 64.0]
ANY = [*MASSES, -0.0, -1.0, -2.5, math.nan, math.inf, -math.inf, 1e-40]


@st.composite
def cases(draw: st.DrawFn, values: list[float]) -> Case:
    layers, heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    sink, recent = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    floor = max(1, -(-(sink + recent) // size))
    lengths = torch.tensor(
        [[draw(st.integers(floor * size, floor * size + 25)) for _ in range(heads)] for _ in range(layers)]
    )
    n = int(lengths.max()) + draw(st.integers(0, 2))
    picks = torch.randint(
        len(values), (layers, heads, n), generator=torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    )
    supply = int((lengths // size).sum()) // (layers * heads)
    return Case(torch.tensor(values)[picks], lengths, size, sink, recent, draw(st.integers(floor, supply)))


@QUICK
@given(cases(ANY))
def test_ranks_and_utilities_are_the_definition(case: Case) -> None:
    ranked = case.rank()
    protected = -(-(case.sink + case.recent) // case.block_size)
    for layer, row in enumerate(case.lengths.tolist()):
        for head, n in enumerate(row):
            scores = case.scores[layer, head, :n].tolist()
            order = reference.ranked(scores, case.sink, case.recent)
            assert ranked.order[layer, head, :n].tolist() == order
            assert sorted(ranked.order[layer, head].tolist()) == list(range(case.scores.shape[2]))
            utility = reference.page_utilities(scores, order, case.block_size, case.sink, case.recent)
            got = ranked.utility[layer, head]
            assert (got[len(utility) :] == -math.inf).all()
            largest = sum(min(abs(s), 1e30) for s in scores if s == s)  # what float32 rounds by, where signs differ
            assert got[: len(utility)].tolist() == pytest.approx(utility, rel=1e-6, abs=1e-6 * largest)
            assert (got[protected : len(utility)].diff() <= 0).all()


@QUICK
@given(cases(MASSES))
def test_every_pair_keeps_its_best_tokens(case: Case) -> None:
    ranked = case.rank()
    pages = deal(ranked.utility, case.block_size, case.budget, case.floor)
    keep = survivors(ranked.order, pages, case.block_size)
    assert torch.equal(keep.sum(2), pages * case.block_size)
    assert int(pages.sum()) == case.budget * pages.numel()
    assert (pages >= case.floor).all()
    assert (pages * case.block_size <= case.lengths).all()
    index = torch.arange(keep.shape[2])
    assert not (keep & (index >= case.lengths.unsqueeze(2))).any()
    protected = (index < case.sink) | (index >= case.lengths.unsqueeze(2) - case.recent)
    protected &= index < case.lengths.unsqueeze(2)
    assert keep[protected].all()
    for layer, head in torch.cartesian_prod(*map(torch.arange, pages.shape)).view(-1, 2).tolist():
        n = int(case.lengths[layer, head])
        free = ~protected[layer, head, :n]
        rank = [(float(s), j) for j, s in enumerate(case.scores[layer, head, :n].tolist())]
        stay = [rank[j] for j in range(n) if free[j] and keep[layer, head, j]]
        gone = [rank[j] for j in range(n) if not keep[layer, head, j]]
        assert not stay or not gone or min(stay) > max(gone)


@QUICK
@given(cases(MASSES))
def test_dealing_is_the_greedy_definition_and_loses_least(case: Case) -> None:
    utility = case.rank().utility
    pages = deal(utility, case.block_size, case.budget, case.floor)
    assert torch.equal(pages, reference.deal(utility, case.budget, case.floor))
    kept = reference.retained(utility, pages)
    assert kept == pytest.approx(most_that_can_be_retained(case, utility), rel=1e-6)
    blocks, mass = curve(utility, case.floor)
    whole = reference.retained(utility, (utility > -math.inf).sum(2))
    if whole > 0:
        assert mass[blocks.index(case.budget)] == pytest.approx(kept / whole, rel=1e-5)


def most_that_can_be_retained(case: Case, utility: Tensor) -> float:
    """By trying every number of pages for every pair (pair by pair: best[used] over those before it)."""
    best = {0: 0.0}
    for pair in utility.flatten(0, 1).tolist():
        after: dict[int, float] = {}
        for used, worth in best.items():
            for n in range(case.floor, len([u for u in pair if u > -math.inf]) + 1):
                total = worth + sum(pair[:n])
                if total > after.get(used + n, -math.inf):
                    after[used + n] = total
        best = after
    return best[case.budget * utility.shape[0] * utility.shape[1]]


@QUICK
@given(cases(ANY), st.data())
def test_more_blocks_never_take_a_page_away(case: Case, data: st.DataObject) -> None:
    ranked = case.rank()
    fewer = data.draw(st.integers(case.floor, case.budget))
    less = deal(ranked.utility, case.block_size, fewer, case.floor)
    more = deal(ranked.utility, case.block_size, case.budget, case.floor)
    assert (less <= more).all()
    before, after = (survivors(ranked.order, pages, case.block_size) for pages in (less, more))
    assert not (before & ~after).any()


@QUICK
@given(cases(MASSES), st.data())
def test_the_names_of_layers_and_heads_only_break_ties(case: Case, data: st.DataObject) -> None:
    utility = case.rank().utility
    layers, heads, count = utility.shape
    order = torch.tensor(data.draw(st.permutations(range(layers * heads))))
    here = deal(utility, case.block_size, case.budget, case.floor)
    renamed = utility.view(-1, count)[order].view(layers, heads, count)
    there = deal(renamed, case.block_size, case.budget, case.floor)
    # What is retained is the same; who gets it is the same unless two pages at the edge are worth the same.
    assert reference.retained(renamed, there) == pytest.approx(reference.retained(utility, here))
    apart = utility + torch.rand(utility.shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    apart[:, :, case.floor :] = apart[:, :, case.floor :].cummin(2).values
    assume(apart[apart > -math.inf].unique().numel() == (apart > -math.inf).sum())
    moved = deal(apart, case.block_size, case.budget, case.floor).view(-1)[order].view(layers, heads)
    shuffled = apart.view(-1, count)[order].view(layers, heads, count)
    assert torch.equal(deal(shuffled, case.block_size, case.budget, case.floor), moved)


@QUICK
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.data())
def test_equal_scores_are_dealt_in_a_known_order(layers: int, heads: int, count: int, data: st.DataObject) -> None:
    """All pages worth the same: everybody gets as many; the newest tokens stay."""
    budget = data.draw(st.integers(1, count))
    ranked = page_utilities(torch.ones(layers, heads, count * 4), torch.full((layers, heads), count * 4), 4, 0, 0)
    pages = deal(ranked.utility, 4, budget, 1)
    assert (pages == budget).all()
    keep = survivors(ranked.order, pages, 4)
    assert torch.equal(keep, (torch.arange(count * 4) >= (count - budget) * 4).expand_as(keep))


@QUICK
@given(cases(ANY))
def test_the_same_numbers_give_the_same_pages(case: Case) -> None:
    """Strides and repetition change nothing."""
    first = case.rank()
    strided = Case(
        case.scores.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        case.lengths.t().contiguous().t(),
        case.block_size,
        case.sink,
        case.recent,
        case.budget,
    ).rank()
    assert torch.equal(first.order, strided.order)
    assert torch.equal(first.utility, strided.utility)
    dealt = [
        deal(utility, case.block_size, case.budget, case.floor)
        for utility in (first.utility, first.utility.permute(2, 1, 0).contiguous().permute(2, 1, 0))
    ]
    assert torch.equal(*dealt)
