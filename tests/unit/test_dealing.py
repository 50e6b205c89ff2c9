# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Dealing pages to (layer, kv head) pairs: the awkward values, the curve and the refusals.

What holds for any input is in ``tests/property/test_dealing_properties.py``.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from deltamem_vllm.dealing import reference
from deltamem_vllm.dealing.deal import curve, deal, page_mass, page_utilities, survivors
from deltamem_vllm.scoring.base import select_survivors

INF, NAN = math.inf, math.nan


def one_pair(scores: list[float], block_size: int = 2, sink: int = 0, recent: int = 0):
    return page_utilities(torch.tensor([[scores]]), torch.tensor([[len(scores)]]), block_size, sink, recent)


class TestRanking:
    def test_pages_are_the_best_tokens_first(self) -> None:
        ranked = one_pair([1.0, 5.0, 2.0, 4.0, 3.0])
        assert ranked.order.tolist() == [[[1, 3, 4, 2, 0]]]
        assert ranked.utility.tolist() == [[[9.0, 5.0]]]
        assert ranked.order.dtype == torch.int64
        assert ranked.utility.dtype == torch.float32

    def test_protected_tokens_come_first_with_their_true_scores(self) -> None:
        ranked = one_pair([0.5, INF, 7.0, 3.0, 0.25, 1.0], sink=1, recent=1)
        assert ranked.order.tolist() == [[[5, 0, 1, 2, 3, 4]]]
        assert ranked.utility[0, 0, 0] == 1.5
        # Worth less than the next page: only pages without protected tokens are ordered by utility.
        assert ranked.utility[0, 0, 1] > 1e29
        assert ranked.utility[0, 0, 2] == 3.25

    def test_awkward_scores_rank_like_numbers(self) -> None:
        ranked = one_pair([NAN, -INF, -1.0, -0.0, 0.0, 2.0, INF, -2.0])
        # -0.0 equals 0.0, NaN equals -inf: the newer first.
        assert ranked.order.tolist() == [[[6, 5, 4, 3, 2, 7, 1, 0]]]
        assert ranked.utility.isfinite().all()

    def test_negative_scores_keep_their_order(self) -> None:
        scores = -torch.rand(1, 1, 64)
        ranked = page_utilities(scores, torch.tensor([[64]]), 8, 0, 0)
        assert torch.equal(scores[0, 0][ranked.order[0, 0]], scores[0, 0].sort(descending=True).values)

    def test_pages_that_tokens_do_not_fill_cannot_be_dealt(self) -> None:
        scores = torch.rand(1, 3, 10)
        ranked = page_utilities(scores, torch.tensor([[10, 7, 1]]), 2, 0, 1)
        assert ranked.utility.isinf().sum(2).tolist() == [[0, 2, 5]]
        for head, length in enumerate((10, 7, 1)):
            assert set(ranked.order[0, head, :length].tolist()) == set(range(length))

    def test_what_stands_past_a_length_is_ignored(self) -> None:
        scores = torch.rand(2, 1, 12)
        lengths = torch.tensor([[9], [12]])
        before = page_utilities(scores, lengths, 4, 1, 2)
        scores[0, 0, 9:] = torch.tensor([NAN, INF, 1e9])
        after = page_utilities(scores, lengths, 4, 1, 2)
        assert torch.equal(before.order[0, 0, :9], after.order[0, 0, :9])
        assert torch.equal(before.utility, after.utility)

    def test_protection_follows_each_pairs_own_length(self) -> None:
        scores = torch.zeros(1, 2, 8)
        ranked = page_utilities(scores, torch.tensor([[8, 5]]), 2, 1, 1)
        assert [set(row[:2].tolist()) for row in ranked.order[0]] == [{0, 7}, {0, 4}]

    def test_a_pair_shorter_than_its_protected_ends_is_protected_whole(self) -> None:
        ranked = page_utilities(torch.rand(1, 1, 4), torch.tensor([[3]]), 2, 4, 4)
        assert ranked.order[0, 0].tolist() == [2, 1, 0, 3]

    def test_the_choice_is_that_of_equal_budgets(self) -> None:
        """One pair at a time, dealing keeps what select_survivors keeps."""
        scores = torch.randn(3, 2, 96).round(decimals=1)
        scores[0, 0, ::7] = NAN
        lengths = torch.full((3, 2), 96)
        ranked = page_utilities(scores, lengths, 16, 4, 8)
        mask = survivors(ranked.order, torch.full((3, 2), 2), 16)
        for layer in range(3):
            expected = select_survivors(scores[layer], 32, 4, 8)
            assert torch.equal(mask[layer], torch.zeros(2, 96, dtype=torch.bool).scatter_(1, expected, True))

    def test_inputs_are_left_alone(self) -> None:
        scores, lengths = torch.rand(2, 2, 16), torch.full((2, 2), 13)
        kept = scores.clone()
        ranked = page_utilities(scores, lengths, 4, 1, 1)
        utility = ranked.utility.clone()
        pages = deal(ranked.utility, 4, 2, 1)
        survivors(ranked.order, pages, 4)
        curve(ranked.utility, 1)
        assert torch.equal(scores, kept)
        assert torch.equal(ranked.utility, utility)

    def test_half_precision_scores(self) -> None:
        scores = torch.tensor([[[0.5, 0.25, 1.0, 2.0]]], dtype=torch.bfloat16)
        assert page_utilities(scores, torch.tensor([[4]]), 2, 0, 0).utility.tolist() == [[[3.0, 0.75]]]

    def test_sums_stay_finite(self) -> None:
        huge = page_utilities(torch.full((1, 2, 4096), INF), torch.full((1, 2), 4096), 4096, 0, 0).utility
        assert huge.isfinite().all()
        assert huge.sum().isfinite()


class TestDealing:
    def test_the_best_pages_of_all_pairs_win(self) -> None:
        utility = torch.tensor([[[9.0, 8.0, 7.0]], [[6.0, 1.0, 0.0]]])
        assert deal(utility, 4, 2, 0).tolist() == [[3], [1]]
        assert deal(utility, 4, 2, 1).tolist() == [[3], [1]]
        assert deal(utility, 4, 2, 2).tolist() == [[2], [2]]
        assert deal(utility, 4, 0, 0).tolist() == [[0], [0]]

    def test_equal_pages_go_to_earlier_ranks_then_layers_then_heads(self) -> None:
        even = torch.zeros(2, 2, 4)
        assert deal(even, 4, 2, 0).tolist() == [[2, 2], [2, 2]]
        short = even.clone()
        short[1, 1] = -INF
        assert deal(short, 4, 1, 0).tolist() == [[2, 1], [1, 0]]

    def test_a_poor_protected_page_does_not_hold_back_the_next(self) -> None:
        utility = torch.tensor([[[0.0, 9.0, 8.0], [3.0, 2.0, 1.0]]])
        assert deal(utility, 4, 2, 1).tolist() == [[3, 1]]

    def test_a_page_is_never_dealt_before_an_earlier_one(self) -> None:
        """Without a floor the rich page counts as much as the poor one before it."""
        utility = torch.tensor([[[0.5, 9.0], [3.0, 2.0]]])
        assert deal(utility, 4, 1, 0).tolist() == [[0, 2]]

    def test_floor_pages_beat_infinite_ones(self) -> None:
        utility = torch.tensor([[[INF, INF, INF], [0.0, 0.0, 0.0]]])
        assert deal(utility, 4, 2, 1).tolist() == [[3, 1]]

    def test_infinite_pages_wait_for_the_ones_before_them(self) -> None:
        assert deal(torch.tensor([[[0.5, INF], [3.0, 2.0]]]), 4, 1, 0).tolist() == [[0, 2]]

    def test_nan_is_worth_nothing(self) -> None:
        utility = torch.tensor([[[2.0, NAN, NAN], [3.0, 1.0, -1.0]]])
        assert deal(utility, 4, 2, 0).tolist() == [[2, 2]]

    def test_pages_that_do_not_exist_are_never_dealt(self) -> None:
        utility = torch.tensor([[[2.0, -INF], [-5.0, -6.0]]])
        assert deal(utility, 4, 1, 0).tolist() == [[1, 1]]
        with pytest.raises(ValueError, match="deal at most 1 blocks"):
            deal(utility, 4, 2, 0)

    def test_works_where_no_value_can_be_read(self) -> None:
        """Shapes without data stand for a device: whatever reads a value on the host fails there."""
        scores = torch.empty(2, 3, 64, device="meta")
        ranked = page_utilities(scores, torch.empty(2, 3, dtype=torch.int64, device="meta"), 16, 1, 4)
        pages = deal(ranked.utility, 16, 2, 1)
        mask = survivors(ranked.order, pages, 16)
        assert (pages.shape, mask.shape) == ((2, 3), (2, 3, 64))


class TestCurve:
    def test_is_what_dealing_retains(self) -> None:
        scores = torch.rand(3, 2, 128) ** 6
        lengths = torch.full((3, 2), 128)
        lengths[0, 0] = 96
        utility = page_utilities(scores, lengths, 16, 2, 8).utility
        blocks, mass = curve(utility, 1)
        assert blocks == tuple(range(1, 9))  # 46 pages: the eighth block is not full
        total = reference.retained(utility, (utility > -INF).sum(2))
        for m, share in zip(blocks[:-1], mass[:-1], strict=True):
            assert share == pytest.approx(reference.retained(utility, deal(utility, 16, m, 1)) / total, rel=1e-5)
        assert mass[-1] == 1.0

    def test_long_requests_are_sampled(self) -> None:
        blocks, mass = curve(torch.rand(2, 2, 4096).sort(2, descending=True).values, 3)
        assert len(blocks) <= 64 and blocks[0] == 3 and blocks[-1] == 4096
        assert list(blocks) == sorted(set(blocks)) and list(mass) == sorted(mass) and mass[-1] == 1.0
        gaps = [after - before for before, after in pairwise(blocks)]
        assert gaps[0] <= 2 and 100 < gaps[-1] < 150

    @pytest.mark.parametrize("worth", [0.0, -3.0, NAN])
    def test_is_linear_without_utility(self, worth: float) -> None:
        blocks, mass = curve(torch.full((2, 2, 4), worth), 1)
        assert blocks == (1, 2, 3, 4)
        assert mass == (0.25, 0.5, 0.75, 1.0)

    def test_negative_pages_count_as_nothing(self) -> None:
        assert curve(torch.tensor([[[3.0, 1.0, -7.0]]]), 1) == ((1, 2, 3), (0.75, 1.0, 1.0))

    @pytest.mark.parametrize("floor", [0, 3])
    def test_ends(self, floor: int) -> None:
        blocks, mass = curve(torch.ones(1, 1, 3), floor)
        assert (blocks, mass) == (((0, 1, 2, 3), (0.0, 1 / 3, 2 / 3, 1.0)) if floor == 0 else ((3,), (1.0,)))

    def test_nothing_to_deal(self) -> None:
        assert curve(torch.full((1, 1, 3), -INF), 0) == ((0,), (1.0,))


class TestMass:
    def test_is_the_share_of_what_is_not_protected(self) -> None:
        scores = [9.0, 5.0, 2.0, 1.0, 0.0, 7.0]
        order = one_pair(scores, sink=1, recent=1).order
        mass = page_mass(torch.tensor([[scores]]), torch.tensor([[6]]), order, 2, 1, 1)
        # Page 0 holds the two protected tokens.
        assert mass.flatten().tolist() == pytest.approx([0.0, 7 / 8, 1 / 8])

    def test_negative_scores_count_from_the_lowest(self) -> None:
        scores = torch.tensor([[[-1.0, -3.0, -2.0, -3.0]]])
        order = page_utilities(scores, torch.tensor([[4]]), 2, 0, 0).order
        assert page_mass(scores, torch.tensor([[4]]), order, 2, 0, 0).flatten().tolist() == pytest.approx([1.0, 0.0])

    def test_a_pair_without_mass_spreads_it_evenly(self) -> None:
        scores = torch.zeros(1, 1, 4)
        order = page_utilities(scores, torch.tensor([[4]]), 2, 0, 0).order
        assert page_mass(scores, torch.tensor([[4]]), order, 2, 0, 0).flatten().tolist() == [0.5, 0.5]

    def test_what_stands_past_a_pairs_length_is_ignored(self) -> None:
        scores = torch.tensor([[[1.0, 3.0, -INF, NAN]]])
        order = page_utilities(scores, torch.tensor([[2]]), 2, 0, 0).order
        assert page_mass(scores, torch.tensor([[2]]), order, 2, 0, 0).flatten().tolist() == [1.0, 0.0]

    def test_a_dense_request_needs_more_blocks_than_an_easy_one(self) -> None:
        utility = torch.arange(16, 0, -1).float().expand(2, 2, 16)  # the same for both: a calibration's
        lengths = torch.full((2, 2), 64)
        easy, dense = torch.rand(2, 2, 64) ** 12, torch.rand(2, 2, 64)
        retained = []
        for scores in (easy, dense):
            order = page_utilities(scores, lengths, 4, 1, 3).order
            retained.append(dict(zip(*curve(utility, 1, page_mass(scores, lengths, order, 4, 1, 3)), strict=True)))
        assert all(retained[0][m] > retained[1][m] for m in range(2, 15))
        assert retained[0][1] == retained[1][1] == 0.0, "the floor holds protected tokens only"


RANKED = (torch.rand(2, 3, 16), torch.full((2, 3), 16))
UTILITY = torch.rand(2, 3, 4).sort(2, descending=True).values


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: page_utilities(RANKED[0][0], RANKED[1], 4, 0, 0), "must be a float"),
            (lambda: page_utilities(RANKED[0].long(), RANKED[1], 4, 0, 0), "must be a float"),
            (lambda: page_utilities(RANKED[0][:, :, :0], RANKED[1], 4, 0, 0), "empty dimension"),
            (lambda: page_utilities(RANKED[0], RANKED[1][:1], 4, 0, 0), "lengths must be int64"),
            (lambda: page_utilities(RANKED[0], RANKED[1].int(), 4, 0, 0), "lengths must be int64"),
            (lambda: page_utilities(RANKED[0], RANKED[1] + 1, 4, 0, 0), "between 0 and 16, got 17"),
            (lambda: page_utilities(RANKED[0], RANKED[1] - 17, 4, 0, 0), "got -1"),
            (lambda: page_utilities(*RANKED, 0, 0, 0), "block_size must be 1 to 16"),
            (lambda: page_utilities(*RANKED, 17, 0, 0), "block_size must be 1 to 16"),
            (lambda: page_utilities(*RANKED, 4, -1, 0), "sink=-1"),
            (lambda: page_utilities(*RANKED, 4, 0, -1), "recent=-1"),
            (lambda: deal(UTILITY[0], 4, 1, 0), "must be a float"),
            (lambda: deal(UTILITY.long(), 4, 1, 0), "must be a float"),
            (lambda: deal(UTILITY, 4, 5, 0), "out of 4 pages"),
            (lambda: deal(UTILITY, 4, 1, 2), "at least 2 pages"),
            (lambda: deal(UTILITY, 4, 1, -1), "0 <= floor"),
            (lambda: deal(UTILITY, 0, 1, 0), "block_size >= 1"),
            (lambda: deal(torch.tensor([[[1.0, 1.0], [-INF, -INF]]]), 4, 1, 1), "one has only 0"),
            (lambda: survivors(RANKED[0], RANKED[1], 4), "order must be"),
            (lambda: survivors(RANKED[0].long(), RANKED[1][:1], 4), "order must be"),
            (lambda: survivors(RANKED[0].long(), RANKED[1].int(), 4), "order must be"),
            (lambda: survivors(RANKED[0].long(), RANKED[1], 4), "0 to 4 pages of 4, got 16"),
            (lambda: survivors(RANKED[0].long(), RANKED[1] - 17, 4), "got -1"),
            (lambda: survivors(RANKED[0].long(), RANKED[1], 0), "at least 1, got 0"),
            (lambda: curve(UTILITY[0], 1), "must be a float"),
            (lambda: curve(UTILITY, 5), "between 0 and the 4 pages"),
            (lambda: curve(UTILITY, -1), "between 0 and the 4 pages"),
            (lambda: curve(torch.full((1, 1, 2), -INF), 1), "one has only 0"),
        ],
    )
    def test_mistakes(self, call, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            call()
