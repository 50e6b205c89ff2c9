# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Dealing hot and cold pages: small cases by hand, awkward values and the ends of the curve.

What holds for any input is in ``tests/property/test_tier_properties.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltamem_vllm.dealing.cold_pages import ColdPages
from deltamem_vllm.dealing.dealer import _Worth
from deltamem_vllm.dealing.prior import HeadPrior
from deltamem_vllm.dealing.tiered import TieredUtility, tiered_utility
from deltamem_vllm.scoring.base import Scorer, ScoreView

INF, NAN = math.inf, math.nan
SIZE, CAPACITY = 2, 4


def cold_pages(scores: list[list[float]]) -> tuple[ColdPages, Tensor]:
    """One pair's cold pages, with these tokens."""
    tokens = torch.tensor([[[len(page) for page in scores]]])
    filled = torch.full((1, 1, len(scores), CAPACITY), -INF)
    for page, row in enumerate(scores):
        filled[0, 0, page, : len(row)] = torch.tensor(row)
    count = torch.tensor([[len(scores)]])
    return ColdPages(count, torch.arange(len(scores)).view(1, 1, -1).int(), tokens, filled.half()), filled.half()


def rate(
    scores: Tensor,
    cold: list[list[float]] | None = None,
    loss: float = 0.5,
    sink: int = 0,
    recent: int = 0,
    lengths: Tensor | None = None,
) -> TieredUtility:
    lengths = torch.full(scores.shape[:2], scores.shape[2]) if lengths is None else lengths
    pages, coded = (None, None) if cold is None else cold_pages(cold)
    return tiered_utility(
        scores, lengths, pages, coded, lambda live, ends: live, SIZE, CAPACITY, loss, sink, recent
    )  # fmt: skip


class TestWorth:
    def test_hot_and_cold_tokens_are_ranked_together(self) -> None:
        rated = rate(torch.tensor([[[8.0, 1.0, 6.0, 1.0]]]), [[7.0, 5.0], [1.0, 1.0, 0.0]])
        # Ranked 8 7 | 6 5 | 1 1 | 1 1 | 0: the first page counts as the one behind it, the last token as those before.
        assert rated.old is not None
        assert rated.old.flatten().tolist() == [0.5 * (5.5 + 5.5), 0.5 * 3.0]
        # In hot pages 5.5 and 5.5, then 1 and 1. The second page makes them exact.
        assert rated.gains[0, 0].tolist() == [INF, 2.0] and rated.gains[0, 1].tolist() == [5.5, 1.5]

    def test_a_cold_page_goes_when_hot_tokens_are_worth_more(self) -> None:
        rated = rate(torch.tensor([[[8.0, 1.0, 6.0, 1.0]]]), [[7.0, 5.0], [1.0, 1.0, 0.0]])
        stays = []
        for budget in range(1, 5):
            hot, choice = rated.choose(budget, CAPACITY, SIZE)
            assert choice.stay is not None
            stays.append((int(hot), int(choice.made), choice.stay.flatten().tolist()))
        assert stays == [
            (1, 0, [False, False]),
            (1, 0, [True, False]),
            (2, 0, [True, False]),
            (2, 0, [True, True]),
        ]

    def test_equal_cold_pages_go_from_the_last(self) -> None:
        _, choice = rate(torch.ones(1, 1, 4), [[1.0, 1.0]] * 5).choose(4, CAPACITY, SIZE)
        assert choice.stay is not None
        assert choice.stay.flatten().tolist() == sorted(choice.stay.flatten().tolist(), reverse=True)

    def test_a_cold_token_among_protected_ones_counts_as_those_behind_them(self) -> None:
        """A page with a sink may hold most of what attention sees, or nearly nothing."""
        for sink in (1000.0, 0.0):
            rated = rate(torch.tensor([[[sink, 1.0, 1.0, 1.0]]]), [[2.0]], sink=1)
            assert rated.old is not None and rated.old.flatten().tolist() == [0.5]

    @pytest.mark.parametrize("awkward", [NAN, -INF])
    def test_a_cold_token_without_a_score_is_there_and_comes_last(self, awkward: float) -> None:
        rated = rate(torch.ones(1, 1, 4), [[awkward, 4.0, 3.0], [1.0]])
        assert rated.old is not None
        # Ranked 4 3 | 1 1 | 1 1 | 1 and the awkward one: -1e30 or 0, and no page is worth less than nothing.
        assert rated.old[0, 0, 0] == pytest.approx(0.5 * (1.0 + 1.0 + (0.5 if awkward != awkward else 0.0)))

    def test_what_stands_past_a_length_is_ignored(self) -> None:
        lengths = torch.tensor([[5]])
        scores = torch.tensor([[[3.0, 2.0, 4.0, 1.0, 1.0, NAN, INF, 9.0]]])
        one = rate(scores, [[5.0]], lengths=lengths)
        other = rate(scores[..., :5].contiguous(), [[5.0]])
        finite = one.gains[..., : other.gains.shape[2]]
        assert torch.equal(finite, other.gains) and one.gains[..., other.gains.shape[2] :].eq(-INF).all()

    def test_worthless_scores_are_dealt_all_the_same(self) -> None:
        for worth in (0.0, -3.0, NAN):
            hot, choice = rate(torch.full((2, 2, 8), worth)).choose(3, CAPACITY, SIZE)
            assert int(hot.sum()) + len(choice.pair) == 12 and (hot >= 1).all()


class TestCurve:
    def test_ends_where_all_is_kept(self) -> None:
        scores = (torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(0))) ** 4
        blocks, mass = rate(scores, sink=1, recent=2).curve(2)
        assert blocks == tuple(range(2, 21)) and mass[-1] == 1.0 and mass[0] < mass[1] < mass[5]

    def test_a_request_that_cannot_give_anything(self) -> None:
        assert rate(torch.rand(1, 2, 4), sink=2, recent=2).curve(2) == ((2,), (1.0,))

    def test_cold_pages_are_given_up_in_their_place(self) -> None:
        """A page of the floor with two tokens of 5.5; then 5.5, 2.0 and 1.5."""
        blocks, mass = rate(torch.tensor([[[8.0, 1.0, 6.0, 1.0]]]), [[7.0, 5.0], [1.0, 1.0, 0.0]]).curve(1)
        assert blocks == (1, 2, 3, 4)
        assert mass == pytest.approx([11 / 20, 16.5 / 20, 18.5 / 20, 1.0])

    def test_protected_tokens_are_not_counted_with_what_stays_in_any_case(self) -> None:
        """Of the two pages of the floor one token is free: it is worth 1, not as much as the cold page behind it."""
        rated = rate(torch.tensor([[[9.0, 9.0, 9.0, *[1.0] * 9]]]), sink=2, recent=1)
        assert rated.always.tolist() == [[1.0]]
        assert rated.gains[0, 0, 2] == 2.0 and rated.curve(2)[1][0] == pytest.approx(1 / (1 + 8))

    def test_is_linear_without_worth(self) -> None:
        assert rate(torch.zeros(1, 2, 8)).curve(1) == ((1, 2, 3, 4), (0.25, 0.5, 0.75, 1.0))


class OwnScale(Scorer):
    name = "own-scale"
    summary = "for this test"
    source = "this test"
    comparable = False

    def score(self, view: ScoreView) -> Tensor:
        raise AssertionError("only what it says of itself is asked for here")


def deal_by(prior: HeadPrior | None, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Hot and cold pages of each pair."""
    worth = _Worth(prior, OwnScale(), "global", scores.shape[2], SIZE)
    lengths = torch.full(scores.shape[:2], scores.shape[2])
    rated = tiered_utility(
        scores, lengths, None, None, lambda live, ends: worth.of(live, ends)[0], SIZE, CAPACITY, 0.3, 1, 2
    )
    hot, choice = rated.choose(5, CAPACITY, SIZE)
    return hot, choice.made


@pytest.mark.parametrize("even", [False, True], ids=["alone", "even calibration"])
def test_scores_on_scales_of_their_own_deal_all_pairs_the_same(even: bool) -> None:
    scores = (
        torch.rand(2, 3, 24, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 100.0, 1e-3])[:, None]
    )
    hot, made = deal_by(HeadPrior(torch.linspace(1, 0, 8).expand(2, 3, 8)) if even else None, scores)
    assert hot.unique().numel() == made.unique().numel() == 1 and int(made[0, 0]) > 0
    assert int((hot + made)[0, 0]) == 5


def test_a_calibration_says_which_pair_deserves_more() -> None:
    table = torch.linspace(1, 0, 8) * torch.tensor([[9.0, 1.0, 1.0], [1.0, 1.0, 0.1]]).unsqueeze(2)
    hot, made = deal_by(HeadPrior(table), torch.rand(2, 3, 24, generator=torch.Generator().manual_seed(1)))
    pages = hot + made
    assert int(pages.sum()) == 30 and pages.argmax() == 0 and pages.argmin() == 5
