# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How a pair splits its pages into hot and cold ones: small cases by hand, both ends of the loss, the refusals.

What holds for any input is in ``tests/property/test_tier_properties.py``.
"""

from __future__ import annotations

import math

import pytest
import torch

from deltamem_vllm.dealing.tiers import TierPath, tier_path

INF = math.inf


def one_pair(worth: list[float], capacity: int = 4, loss: float = 0.1, floor: int = 0, size: int = 2) -> TierPath:
    return tier_path(torch.tensor([[worth]]), torch.tensor([[len(worth)]]), size, capacity, loss, floor)


class TestSplits:
    def test_coverage_first_then_exactness(self) -> None:
        path = one_pair([8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0])
        # One page: two exact tokens are 16, four coded ones 0.9 * 24. Two: all eight coded, or 16 + 0.9 * 12.
        assert path.hot.flatten().tolist() == [0, 0, 0, 2, 4]
        assert path.gains.flatten().tolist() == pytest.approx([21.6, 5.4, 24 + 0.9 * 6 - 27, 0.6])

    def test_a_page_may_add_more_than_the_one_before(self) -> None:
        """The second page makes all four tokens exact; without it they are coded, so its worth is what they lose."""
        path = one_pair([1.0, 1.0, 1.0, 1.0], loss=0.75)
        assert path.hot.flatten().tolist() == [0, 1, 2]
        path = one_pair([1.0] * 8 + [0.0] * 4, capacity=6, loss=0.5)
        assert path.gains[0, 0].tolist() != sorted(path.gains[0, 0].tolist(), reverse=True)

    def test_the_first_pages_are_hot_whatever_they_are_worth(self) -> None:
        path = one_pair([0.0, 0.0, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0, 1.0, 1.0], floor=2)
        assert path.gains[0, 0, :2].tolist() == [INF, INF]
        assert path.hot[0, 0, 2:].tolist() == [2, 2, 4, 5]
        assert path.gains[0, 0, 2] == pytest.approx(0.9 * 36)

    def test_what_is_left_of_a_pair_needs_a_cold_page(self) -> None:
        path = one_pair([4.0, 3.0, 2.0, 1.0, 1.0], loss=0.5)
        assert path.hot[0, 0].tolist() == [0, 1, 2, 2]
        assert path.gains[0, 0].tolist() == pytest.approx([7.0, 3.0, 0.5])

    def test_pairs_are_split_apart(self) -> None:
        worth = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 99.0, 99.0]]])
        path = tier_path(worth, torch.tensor([[4, 2]]), 2, 4, 0.1, 1)
        assert path.gains[0, 1].tolist() == [INF, -INF], "tokens past a pair's length are nobody's"
        assert path.gains[0, 0].tolist() == pytest.approx([INF, 3.0])

    def test_equal_splits_are_hot(self) -> None:
        assert one_pair([0.0] * 8, loss=0.1).hot.flatten().tolist() == [0, 1, 2, 3, 4]
        assert one_pair([1.0] * 8, loss=0.5).hot.flatten().tolist() == [0, 1, 2, 3, 4]
        assert one_pair([1.0] * 8, loss=0.4).hot.flatten().tolist() == [0, 0, 0, 2, 4]

    def test_without_loss_tokens_are_coded_until_all_are_held(self) -> None:
        path = one_pair([float(n) for n in range(16, 0, -1)], loss=0.0)
        assert path.hot.flatten().tolist() == [0, 0, 0, 0, 0, 2, 4, 6, 8]
        assert path.gains[0, 0, 4:].eq(0).all(), "exactness is worth nothing"

    def test_where_coded_tokens_are_worth_nothing_every_page_is_hot(self) -> None:
        path = one_pair([3.0, 2.0, 2.0, 0.0, 0.0, 0.0], loss=1.0)
        assert path.hot.flatten().tolist() == [0, 1, 2, 3]
        assert path.gains.flatten().tolist() == [5.0, 2.0, 0.0]

    def test_inputs_are_left_alone(self) -> None:
        worth, lengths = torch.rand(2, 2, 24).sort(2, descending=True).values, torch.full((2, 2), 20)
        kept = worth.clone()
        tier_path(worth, lengths, 4, 8, 0.1, 1)
        assert torch.equal(worth, kept)

    def test_works_where_no_value_can_be_read(self) -> None:
        """Shapes without data stand for a device: whatever reads a value on the host fails there."""
        path = tier_path(
            torch.empty(2, 3, 60, device="meta"), torch.empty(2, 3, dtype=torch.int64, device="meta"), 16, 56, 0.1, 1
        )
        assert (path.gains.shape, path.hot.shape) == ((2, 3, 4), (2, 3, 5))


WORTH, LENGTHS = torch.rand(2, 3, 16).sort(2, descending=True).values, torch.full((2, 3), 16)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tier_path(WORTH[0], LENGTHS, 4, 8, 0.1, 1), "worth must be a float"),
        (lambda: tier_path(WORTH.long(), LENGTHS, 4, 8, 0.1, 1), "worth must be a float"),
        (lambda: tier_path(WORTH[:, :, :0], LENGTHS, 4, 8, 0.1, 1), "empty dimension"),
        (lambda: tier_path(WORTH, LENGTHS[:1], 4, 8, 0.1, 1), "lengths must be int64"),
        (lambda: tier_path(WORTH, LENGTHS.int(), 4, 8, 0.1, 1), "lengths must be int64"),
        (lambda: tier_path(WORTH, LENGTHS + 1, 4, 8, 0.1, 1), "between 0 and 16, got 17"),
        (lambda: tier_path(WORTH, LENGTHS, 0, 8, 0.1, 1), "block_size=0"),
        (lambda: tier_path(WORTH, LENGTHS, 4, 4, 0.1, 1), "capacity=4"),
        (lambda: tier_path(WORTH, LENGTHS, 4, 8, -0.1, 1), "loss=-0.1"),
        (lambda: tier_path(WORTH, LENGTHS, 4, 8, 1.1, 1), "loss=1.1"),
        (lambda: tier_path(WORTH, LENGTHS, 4, 8, math.nan, 1), "loss=nan"),
        (lambda: tier_path(WORTH, LENGTHS, 4, 8, 0.1, 5), "5 hot pages of 4, but one has 16 tokens"),
        (lambda: tier_path(WORTH, LENGTHS - 13, 4, 8, 0.1, 1), "one has 3 tokens"),
        (lambda: tier_path(WORTH, LENGTHS, 4, 8, 0.1, -1), "-1 hot pages"),
    ],
)
def test_mistakes(call, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
