# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The books of cold pages: which tokens go to which page, old pages beside new ones, and the tables of a batch.

Tables under random batches are in ``tests/property/test_page_tables.py``.
"""

from __future__ import annotations

import math

import pytest
import torch

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.dealing.cold_pages import (
    ColdChoice,
    ColdPages,
    ColdTables,
    by_pair,
    combined,
    raw_bytes,
    tokens_of_new_pages,
)

INF = math.inf


class TestNewPages:
    def test_the_best_tokens_go_to_the_first(self) -> None:
        order = torch.tensor([[[3, 1, 0, 2, 4, 5], [5, 4, 3, 2, 1, 0]]])
        pair, tokens, counts = tokens_of_new_pages(
            order, torch.tensor([[5, 6]]), torch.tensor([[1, 3]]), torch.tensor([[2, 1]]), 3
        )
        assert pair.tolist() == [0, 0, 1]
        assert counts.tolist() == [3, 1, 3]
        assert tokens.tolist() == [[1, 0, 2], [4, 0, 0], [2, 1, 0]], "what a pair does not have is 0"

    def test_none(self) -> None:
        none = torch.zeros(2, 1, dtype=torch.int64)
        pair, tokens, counts = tokens_of_new_pages(torch.arange(4).expand(2, 1, 4), none + 4, none, none, 3)
        assert (pair.shape, tokens.shape, counts.shape) == ((0,), (0, 3), (0,))


class TestByPair:
    def test_rows_are_filled_up(self) -> None:
        flat = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        rows = by_pair(torch.tensor([[2, 0], [0, 1]]), flat, -INF)
        assert rows.tolist() == [
            [[[1.0, 2.0], [3.0, 4.0]], [[-INF, -INF]] * 2],
            [[[-INF, -INF]] * 2, [[5.0, 6.0], [-INF, -INF]]],
        ]

    def test_nothing(self) -> None:
        rows = by_pair(torch.zeros(2, 2, dtype=torch.int64), torch.zeros(0, 3))
        assert rows.shape == (2, 2, 0, 3)


OLD = ColdPages(
    counts=torch.tensor([[2, 0, 1]]),
    pages=torch.tensor([[[11, 12], [0, 0], [13, 0]]], dtype=torch.int32),
    tokens=torch.tensor([[[3, 2], [0, 0], [1, 0]]]),
    scores=torch.tensor(
        [[[[9.0, 8.0, 7.0], [6.0, 5.0, -INF]], [[-INF] * 3] * 2, [[4.0, -INF, -INF], [-INF] * 3]]]
    ).half(),
)


def choice(stay: torch.Tensor | None) -> ColdChoice:
    return ColdChoice(
        made=torch.tensor([[1, 1, 0]]),
        pair=torch.tensor([0, 1]),
        tokens=torch.tensor([[5, 4, 3], [7, 6, 0]]),
        counts=torch.tensor([3, 2]),
        stay=stay,
    )


NEW = torch.tensor([[3.0, 2.0, 1.0], [0.5, 0.25, -INF]])


class TestCombined:
    def test_new_pages_stand_before_those_that_stay(self) -> None:
        stay = torch.tensor([[[False, True], [False, False], [True, False]]])
        now = combined(choice(stay), OLD, torch.tensor([21, 22, 31, 32]), NEW)
        assert now.counts.tolist() == [[2, 1, 1]] and now.total == 4
        assert now.pages.tolist() == [[[21, 31], [22, 0], [32, 0]]]
        assert now.pages.dtype == torch.int32
        assert now.tokens.tolist() == [[[3, 2], [2, 0], [1, 0]]]
        assert now.numbers.tolist() == [21, 31, 22, 32]
        assert now.scores is not None and now.scores.dtype == torch.float16
        assert now.scores[0, 0].tolist() == [[3.0, 2.0, 1.0], [6.0, 5.0, -INF]]
        assert now.scores[0, 1].tolist() == [[0.5, 0.25, -INF], [-INF] * 3]
        assert now.scores[0, 2].tolist() == [[4.0, -INF, -INF], [-INF] * 3]

    def test_none_before(self) -> None:
        now = combined(choice(None), None, torch.tensor([21, 22]), NEW)
        assert now.counts.tolist() == [[1, 1, 0]]
        assert now.pages.tolist() == [[[21], [22], [0]]]
        assert now.scores is not None and now.scores[0, 2, 0].eq(-INF).all()

    def test_none_after(self) -> None:
        none = torch.zeros(1, 3, dtype=torch.int64)
        empty = ColdChoice(none, none[0, :0], none[:0], none[0, :0], torch.zeros(1, 3, 2, dtype=torch.bool))
        now = combined(empty, OLD, none[0, :0], NEW[:0])
        assert now.total == 0 and now.pages.shape == (1, 3, 0) and now.numbers.numel() == 0
        again = combined(choice(torch.zeros(1, 3, 0, dtype=torch.bool)), now, torch.tensor([21, 22]), NEW)
        assert again.numbers.tolist() == [21, 22]

    def test_scores_do_not_outlast_a_page_without_any(self) -> None:
        stay = torch.tensor([[[True, True], [False, False], [True, False]]])
        assert combined(choice(stay), OLD, torch.arange(5), None).scores is None

    def test_scores_beyond_half_precision_stay_finite(self) -> None:
        """Infinity would outrank all others, minus infinity stand for no token."""
        now = combined(choice(None), None, torch.tensor([21, 22]), NEW * 1e6)
        assert now.scores is not None
        assert now.scores[0, 0, 0].tolist() == [65504.0] * 3
        assert combined(choice(None), None, torch.tensor([1, 2]), -NEW.abs() * 1e6).scores[0, 0, 0].isfinite().all()


class TestTables:
    def make(self, fixed: bool) -> ColdTables:
        return ColdTables((1, 2, 3), 20, fixed, torch.device("cpu"))

    @pytest.mark.parametrize("fixed", [False, True])
    def test_rows_are_put_and_cleared(self, fixed: bool) -> None:
        tables = self.make(fixed)
        tables.put(1, OLD)
        pages, counts = tables.of(2)
        assert counts.tolist() == [[[0, 0, 0], [2, 0, 1]]] and counts.dtype == pages.dtype == torch.int32
        assert pages[0, 1, 0, :2].tolist() == [11, 12] and pages[0, 1, 2, 0] == 13
        tables.clear(1, 2)
        assert tables.of(2)[1].eq(0).all()
        tables.put(1, OLD)
        tables.put(1, None)
        assert tables.of(2)[1].eq(0).all()

    def test_they_grow_without_losing_a_row(self) -> None:
        tables = self.make(fixed=False)
        tables.put(0, OLD)
        wide = torch.arange(3 * 9, dtype=torch.int32).view(1, 3, 9)
        tables.put(1, ColdPages(torch.full((1, 3), 9), wide, wide.long(), None))
        pages, counts = tables.of(2)
        assert pages[0, 0, 0, :2].tolist() == [11, 12] and torch.equal(pages[0, 1, :, :9], wide[0])
        assert counts.tolist() == [[[2, 0, 1], [9, 9, 9]]]

    def test_fixed_ones_stay_where_they_are(self) -> None:
        tables = self.make(fixed=True)
        before = tables.of(2)[0].data_ptr()
        wide = torch.zeros(1, 3, 20, dtype=torch.int32)
        tables.put(1, ColdPages(torch.full((1, 3), 20), wide, wide.long(), None))
        assert tables.of(2)[0].data_ptr() == before


def test_pages_as_bytes_are_the_same_memory() -> None:
    pool = torch.zeros(4, 8 * 2 * 16)
    raw = raw_bytes(pool, ColdFormat(4, 16, 8 * 2 * 16 * 4))
    raw[2, :4] = torch.tensor([0, 0, 128, 63], dtype=torch.uint8)
    assert pool[2, 0] == 1.0
    with pytest.raises(ValueError, match="1024 bytes, a cold page 512"):
        raw_bytes(pool, ColdFormat(4, 16, 512))
