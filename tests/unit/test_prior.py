# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a calibration says of pages, and how it joins what a request shows."""

from __future__ import annotations

import math

import pytest
import torch

from deltamem_vllm.dealing.deal import deal
from deltamem_vllm.dealing.prior import HeadPrior, combine

INF, NAN = math.inf, math.nan


def table(layers: int = 2, heads: int = 3, ranks: int = 16, seed: int = 0) -> torch.Tensor:
    made = torch.rand(layers, heads, ranks, generator=torch.Generator().manual_seed(seed))
    return made.sort(dim=2, descending=True).values


class TestPages:
    def test_is_the_integral_over_the_pages_ranks(self) -> None:
        """A slow sum over a thousand slices of each rank."""
        ranks, n, size = table(1, 2, 8), 50, 8
        got = HeadPrior(ranks).pages(n, size, 6)
        for head in range(2):
            for k in range(6):
                slices = [(k * size + (i + 0.5) * size / 1000) / n for i in range(1000)]
                want = sum(float(ranks[0, head, int(q * 8)]) for q in slices) * size / 1000
                assert float(got[0, head, k]) == pytest.approx(want, rel=2e-3)

    def test_all_pages_together_are_all_utility(self) -> None:
        ranks = table()
        got = HeadPrior(ranks).pages(640, 32, 20)
        torch.testing.assert_close(got.sum(2), 640 * ranks.mean(2))

    def test_is_exact_where_pages_are_ranks(self) -> None:
        ranks = table(ranks=16)
        torch.testing.assert_close(HeadPrior(ranks).pages(16 * 4, 4, 16), 4 * ranks)

    def test_pages_past_the_tokens_cannot_be_dealt(self) -> None:
        got = HeadPrior(table()).pages(50, 16, 5)
        assert torch.equal(got.isinf(), torch.tensor([False, False, False, True, True]).expand(2, 3, 5))
        lengths = torch.tensor([[50, 16, 15], [48, 47, 32]])
        whole = HeadPrior(table()).pages(50, 16, 5, lengths)
        assert (whole > -INF).sum(2).tolist() == [[3, 1, 0], [3, 2, 2]]
        assert torch.equal(whole[whole > -INF], got.where(whole > -INF, -INF)[whole > -INF])

    def test_never_increases_and_deals(self) -> None:
        got = HeadPrior(table(seed=3)).pages(1000, 16, 62)
        assert (got.diff(dim=2) <= 0).all()
        assert int(deal(got, 16, 20, 3).sum()) == 20 * 6

    def test_unequal_heads_get_unequal_pages(self) -> None:
        ranks = torch.stack([torch.ones(1, 8), torch.tensor([[8.0, 0, 0, 0, 0, 0, 0, 0]])])
        pages = deal(HeadPrior(ranks).pages(64, 4, 16), 4, 4, 1)
        assert pages.tolist() == [[6], [2]]

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            (torch.rand(2, 8), "must be a float"),
            (torch.ones(1, 1, 4, dtype=torch.int64), "must be a float"),
            (torch.rand(1, 1, 0), "empty dimension"),
            (torch.tensor([[[1.0, NAN]]]), "finite and not negative"),
            (torch.tensor([[[INF, 1.0]]]), "finite and not negative"),
            (torch.tensor([[[1.0, -0.1]]]), "finite and not negative"),
            (torch.tensor([[[1.0, 1.1]]]), "must not increase"),
        ],
    )
    def test_refuses_other_tables(self, bad: torch.Tensor, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            HeadPrior(bad)

    @pytest.mark.parametrize("numbers", [(0, 4, 4), (4, 0, 4), (4, 4, 0)])
    def test_refuses_other_numbers(self, numbers: tuple[int, int, int]) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            HeadPrior(table()).pages(*numbers)

    @pytest.mark.parametrize("lengths", [torch.full((2, 2), 8), torch.full((2, 3), 8.0)])
    def test_refuses_other_lengths(self, lengths: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="lengths must be int64"):
            HeadPrior(table()).pages(8, 4, 2, lengths)


class TestCombine:
    live = torch.tensor([[[8.0, 4.0, -INF], [2.0, 2.0, 0.0]]])
    prior = torch.tensor([[[1.0, 0.5, 0.1], [3.0, 0.5, -INF]]])

    def test_is_the_geometric_mean(self) -> None:
        got = combine(self.live, self.prior)
        lives, priors = [8.0, 4.0, 2.0, 2.0], [1.0, 0.5, 3.0, 0.5]  # the pages that exist
        want = [math.sqrt(a / 4.0 * b / 1.25) for a, b in zip(lives, priors, strict=True)]
        torch.testing.assert_close(got[got > -INF], torch.tensor(want))
        assert got.dtype == torch.float32

    def test_pages_that_do_not_exist_stay_away(self) -> None:
        assert combine(self.live, self.prior).isinf().tolist() == [[[False, False, True], [False, False, True]]]

    @pytest.mark.parametrize("factor", [1e-6, 1e6])
    def test_units_do_not_matter(self, factor: float) -> None:
        torch.testing.assert_close(combine(self.live * factor, self.prior), combine(self.live, self.prior))
        torch.testing.assert_close(combine(self.live, self.prior * factor), combine(self.live, self.prior))

    def test_one_alone_is_itself(self) -> None:
        assert combine(self.live, None) is self.live
        assert combine(None, self.prior) is self.prior

    @pytest.mark.parametrize("empty", [0.0, NAN, -1.0])
    def test_one_that_says_nothing_is_left_out(self, empty: float) -> None:
        got = combine(torch.full((1, 2, 3), empty), self.prior)
        assert deal(got, 4, 1, 0).tolist() == deal(self.prior, 4, 1, 0).tolist() == [[1, 1]]
        assert got.isfinite().sum() == 5

    def test_descending_pages_stay_descending(self) -> None:
        gen = torch.Generator().manual_seed(1)
        a, b = (torch.rand(3, 2, 9, generator=gen).sort(dim=2, descending=True).values for _ in range(2))
        assert (combine(a, b).diff(dim=2) <= 0).all()

    def test_large_and_small_numbers(self) -> None:
        assert combine(torch.full((1, 1, 4), 3e38), torch.full((1, 1, 4), 1e-38)).tolist() == [[[1.0] * 4]]

    def test_refuses_nothing(self) -> None:
        with pytest.raises(ValueError, match="neither was given"):
            combine(None, None)

    def test_refuses_other_shapes(self) -> None:
        with pytest.raises(ValueError, match="one shape"):
            combine(self.live, self.prior[:, :, :2])
