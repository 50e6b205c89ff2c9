# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What holds for every dealing of hot and cold pages, whatever the scores, the lengths, the loss and the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltamem_vllm.dealing import reference
from deltamem_vllm.dealing.cold_pages import ColdChoice, ColdPages
from deltamem_vllm.dealing.deal import deal, deal_pages, page_utilities, survivors
from deltamem_vllm.dealing.tiered import TieredUtility, tiered_utility

QUICK = settings(max_examples=120, deadline=None)
# Few values: ties are what breaks an order. Sums of a handful of them are exact in float32.
MASSES = [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 3.0, 64.0]
LOSSES = st.one_of(st.sampled_from([0.0, 0.01, 0.06, 0.3, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def capacities(draw: st.DrawFn, block_size: int) -> int:
    """Tokens of a cold page: about as in 8, 4 and 2 bits, or any."""
    ratio = draw(st.sampled_from([1.9, 3.6, 7.0, 0.0]))
    return max(block_size + 1, round(ratio * block_size) if ratio else draw(st.integers(2, 40)))


def numbers(draw: st.DrawFn, values: list[float], shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    if draw(st.booleans()):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]
    return torch.rand(shape, generator=generator) ** draw(st.sampled_from([0.3, 1, 4, 12]))


@dataclass(frozen=True)
class Case:
    """A request with tokens in hot and cold pages, and what the scheduler decided."""

    scores: Tensor
    lengths: Tensor
    cold: ColdPages | None
    cold_scores: Tensor | None
    weights: Tensor
    size: int
    capacity: int
    loss: float
    sink: int
    recent: int
    budget: int

    @property
    def floor(self) -> int:
        return max(1, -(-(self.sink + self.recent) // self.size))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return [(layer, head) for layer in range(self.lengths.shape[0]) for head in range(self.lengths.shape[1])]

    def rate(self) -> TieredUtility:
        def combine(live: Tensor, ends: Tensor) -> Tensor:
            """Some pairs are worth more than others."""
            assert torch.equal(ends, self.ends)
            return live * self.weights.unsqueeze(2)

        return tiered_utility(
            self.scores, self.lengths, self.cold, self.cold_scores, combine, self.size, self.capacity, self.loss,
            self.sink, self.recent,
        )  # fmt: skip

    @property
    def ends(self) -> Tensor:
        return self.lengths if self.cold is None else self.lengths + self.cold.tokens.sum(2)

    def choose(self, budget: int | None = None) -> tuple[Tensor, ColdChoice]:
        return self.rate().choose(self.budget if budget is None else budget, self.capacity, self.size)


@st.composite
def cases(draw: st.DrawFn, cold: bool | None = None, loss: float | None = None) -> Case:
    layers, heads, size = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    capacity = draw(capacities(size))
    sink, recent = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    least = max(1, -(-(sink + recent) // size)) * size
    lengths = torch.tensor([[draw(st.integers(least, least + 30)) for _ in range(heads)] for _ in range(layers)])
    scores = numbers(draw, MASSES, (layers, heads, int(lengths.max()) + draw(st.integers(0, 3))))
    pages, coded = None, None
    if cold if cold is not None else draw(st.booleans()):
        width = draw(st.integers(0, 4))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        counts = torch.randint(0, width + 1, (layers, heads), generator=generator)
        there = torch.arange(width) < counts.unsqueeze(2)
        tokens = torch.randint(1, capacity + 1, (layers, heads, width), generator=generator).masked_fill(~there, 0)
        coded = numbers(draw, MASSES, (layers, heads, width, capacity)).half()
        coded = coded.masked_fill(torch.arange(capacity) >= tokens.unsqueeze(3), -math.inf)
        numbered = torch.randperm(1000, generator=generator)[: there.numel()].view_as(there).int()
        pages = ColdPages(counts, numbered.masked_fill(~there, 0), tokens, coded)
    supply = int((lengths + size - 1).div(size, rounding_mode="floor").sum())
    supply += int(pages.counts.sum()) if pages is not None else 0
    weights = torch.tensor(draw(st.lists(st.sampled_from([0.25, 1.0, 1.0, 4.0]), min_size=6, max_size=6)))
    floor = least // size
    return Case(
        scores, lengths, pages, coded, weights[: layers * heads].view(layers, heads), size, capacity,
        draw(LOSSES) if loss is None else loss, sink, recent,
        draw(st.integers(floor, max(supply // (layers * heads), floor))),
    )  # fmt: skip


@QUICK
@given(cases())
def test_every_page_is_dealt_and_no_token_is_in_two_places(case: Case) -> None:
    rated = case.rate()
    hot, choice = rated.choose(case.budget, case.capacity, case.size)
    staying = 0 if choice.stay is None else int(choice.stay.sum())
    assert int(hot.sum()) + int(choice.made.sum()) + staying == case.budget * len(case.pairs)
    assert (hot >= case.floor).all() and (hot * case.size <= case.lengths).all()
    assert len(choice.pair) == int(choice.made.sum()) == len(choice.tokens) == len(choice.counts)
    assert choice.counts.ge(1).all() and choice.counts.le(case.capacity).all(), "a cold page without a token"
    if choice.stay is not None:
        assert case.cold is not None
        there = torch.arange(choice.stay.shape[2]) < case.cold.counts.unsqueeze(2)
        assert not (choice.stay & ~there).any()
    keep = survivors(rated.order, hot, case.size)
    for pair, (layer, head) in enumerate(case.pairs):
        n = int(case.lengths[layer, head])
        exact = keep[layer, head].nonzero().flatten().tolist()
        rows = (choice.pair == pair).nonzero().flatten().tolist()
        assert rows == list(range(rows[0], rows[0] + len(rows))) if rows else True
        coded = [int(t) for row in rows for t in choice.tokens[row, : choice.counts[row]]]
        assert not any(choice.tokens[row, choice.counts[row] :].any() for row in rows)
        assert len(set(exact) | set(coded)) == len(exact) + len(coded)
        assert set(exact) | set(coded) <= set(range(n))
        assert {*range(case.sink), *range(n - case.recent, n)} <= set(exact), "protected tokens stay exact"
        order = reference.ranked(case.scores[layer, head, :n].tolist(), case.sink, case.recent)
        assert sorted(order[: len(exact)]) == exact and order[len(exact) : len(exact) + len(coded)] == coded
        full = [int(choice.counts[row]) for row in rows[:-1]]
        assert full == [case.capacity] * len(full), "only the last new page of a pair has room"


@QUICK
@given(cases())
def test_pages_are_worth_what_the_definition_says(case: Case) -> None:
    rated = case.rate()
    gains = rated.gains
    for layer, head in case.pairs:
        scores = case.scores[layer, head, : case.lengths[layer, head]].tolist()
        own = scores[: case.sink]
        pages = []
        if case.cold is not None and case.cold_scores is not None:
            for e in range(int(case.cold.counts[layer, head])):
                tokens = case.cold_scores[layer, head, e, : case.cold.tokens[layer, head, e]].tolist()
                pages.append(range(len(own), len(own) + len(tokens)))
                own += tokens
        coded = len(own) - case.sink
        own += scores[case.sink :]
        together = reference.ranked(own, case.sink, case.recent)
        utility = reference.page_utilities(own, together, case.size, case.sink, case.recent)
        utility = [w * float(case.weights[layer, head]) for w in utility]
        worth = reference.token_worth(together, utility, case.size, case.floor)
        order = [j + coded * (j >= case.sink) for j in reference.ranked(scores, case.sink, case.recent)]
        best = [
            max(
                reference.splits([worth[j] for j in order], n, case.size, case.capacity, case.loss, case.floor).values()
            )
            for n in range(case.floor, -(-len(scores) // case.size) + 1)
        ]
        found = gains[layer, head]
        assert found[: case.floor].eq(math.inf).all()
        assert found[case.floor + len(best) - 1 :].eq(-math.inf).all()
        steps = [after - before for before, after in zip(best, best[1:], strict=False)]
        assert found[case.floor :][: len(steps)].tolist() == pytest.approx(steps, rel=1e-5, abs=1e-6 * sum(worth))
        if rated.old is not None:
            expected = [(1 - case.loss) * sum(worth[j] for j in page) for page in pages]
            old = rated.old[layer, head]
            assert old[: len(pages)].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert old[len(pages) :].eq(-math.inf).all()


@QUICK
@given(cases(cold=True))
def test_a_cold_page_that_is_worth_more_than_a_page_dealt_stays(case: Case) -> None:
    rated = case.rate()
    _, choice = rated.choose(case.budget, case.capacity, case.size)
    assert rated.old is not None and choice.stay is not None
    taken = deal_pages(rated.gains, case.budget * len(case.pairs))[:, : case.lengths.shape[1]]
    # A page behind one that adds less counts as that one.
    credit = rated.path.gains.cummin(2).values
    index = torch.arange(credit.shape[2])
    dealt = credit[(index < taken.unsqueeze(2)) & (index >= case.floor)].tolist()
    left = credit[(index >= taken.unsqueeze(2)) & (credit > -math.inf)].tolist()
    stay, gone = rated.old[choice.stay].tolist(), rated.old[~choice.stay & (rated.old > -math.inf)].tolist()
    assert max(gone, default=-math.inf) <= min(dealt + stay, default=math.inf)
    assert max(left, default=-math.inf) <= min(dealt + stay, default=math.inf)


@QUICK
@given(cases(cold=False, loss=1.0), st.booleans())
def test_where_coded_tokens_are_worth_nothing_dealing_is_that_of_hot_pages(case: Case, spread: bool) -> None:
    # No token without worth: a cold page can hold what is left of a pair, and would count as much as such hot ones.
    apart = torch.rand(case.scores.shape, generator=torch.Generator().manual_seed(case.budget)) + 0.01
    case = replace(case, scores=apart if spread else case.scores + 0.25)
    budget = min(case.budget, int(case.lengths.div(case.size, rounding_mode="floor").sum()) // len(case.pairs))
    rated = case.rate()
    hot, choice = rated.choose(budget, case.capacity, case.size)
    ranked = page_utilities(case.scores, case.lengths, case.size, case.sink, case.recent)
    assert torch.equal(rated.order, ranked.order)
    assert torch.equal(hot, deal(ranked.utility * case.weights.unsqueeze(2), case.size, budget, case.floor))
    assert choice.made.sum() == 0 and choice.stay is None


@QUICK
@given(cases())
def test_the_same_numbers_give_the_same_choice(case: Case) -> None:
    """Strides and repetition change nothing."""

    def strided(tensor: Tensor) -> Tensor:
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)

    cold = case.cold
    if cold is not None:
        cold = replace(cold, counts=strided(cold.counts), tokens=strided(cold.tokens))
    coded = None if case.cold_scores is None else strided(case.cold_scores)
    again = replace(case, scores=strided(case.scores), lengths=strided(case.lengths), cold=cold, cold_scores=coded)
    (hot, one), (also, other) = case.choose(), again.choose()
    assert torch.equal(hot, also)
    for name in ("made", "pair", "tokens", "counts"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert (one.stay is None and other.stay is None) or torch.equal(one.stay, other.stay)


@QUICK
@given(cases(), st.data())
def test_more_blocks_never_take_a_cold_page_away(case: Case, data: st.DataObject) -> None:
    fewer = data.draw(st.integers(case.floor, case.budget))
    (_, less), (_, more) = case.choose(fewer), case.choose()
    if less.stay is not None:
        assert not (less.stay & ~more.stay).any()


@QUICK
@given(cases())
def test_a_curve_is_what_the_dealt_pages_count(case: Case) -> None:
    """What is retained: the free tokens in the pages of the floor, and the credit of the pages dealt."""
    rated = case.rate()
    blocks, mass = rated.curve(case.floor)
    assert blocks[0] == case.floor and mass[-1] == 1.0
    assert list(blocks) == sorted(set(blocks)) and list(mass) == sorted(mass) and mass[0] >= 0
    gains, heads = rated.gains.double(), case.lengths.shape[1]
    credit = torch.cat([gains[:, :heads].cummin(2).values, gains[:, heads:]], dim=1)
    always = float(rated.always.sum())

    def counted(budget: int) -> float:
        taken = deal_pages(rated.gains, budget * len(case.pairs))
        dealt = torch.arange(credit.shape[2]) < taken.unsqueeze(2)
        return always + float(credit[dealt & credit.isfinite()].sum())

    total = always + float(credit[credit.isfinite()].sum())
    if total <= 0:
        return
    exist = int((gains > -math.inf).sum()) // len(case.pairs)
    for m, share in zip(blocks, mass, strict=True):
        if m <= exist:
            assert share == pytest.approx(counted(m) / total, rel=1e-4, abs=1e-6)
