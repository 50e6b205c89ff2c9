# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the scheduler remembers of a request between a question and its answer."""

from __future__ import annotations

import pytest

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.memory.budgets import budget_for
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.governed import Governed
from deltamem_vllm.request_options import RequestOptions

SIZE = 32
CURVE = UtilityCurve(tuple(range(1, 11)), (0.5, 0.7, 0.8, 0.86, 0.9, 0.93, 0.95, 0.97, 0.99, 1.0))


def governed(**fields: object) -> Governed:
    config = DeltaMemConfig.from_dict({"min_tokens": 0, "keep_ratio": 0.2, "interval": 64, **fields})
    options = RequestOptions.from_extra_args(None, config)
    budget = budget_for(options, config)
    assert budget is not None
    return Governed(budget, options.mode, options.dealing, options.scorer)


def test_one_question_at_a_time() -> None:
    state = governed()
    assert state.wants_curve(330, 330, SIZE)
    state.ask(330)
    assert not state.wants_curve(331, 331, SIZE)
    state.answer(CURVE)
    assert state.curve == CURVE
    assert not state.wants_curve(340, 340, SIZE), "nothing much was written since"
    assert state.wants_curve(330 + 64, 330 + 64, SIZE)


def test_a_server_that_deals_nothing_asks_nothing() -> None:
    assert not governed(dealing="equal").wants_curve(500, 500, SIZE)


def test_an_answer_that_comes_after_a_compaction_is_cut_like_the_request() -> None:
    state = governed()
    state.ask(330)
    state.compacted(330, blocks=4, whole=10)
    assert state.curve is None
    state.answer(CURVE)
    assert state.curve == CURVE.cut(4)
    state.answer(CURVE)
    assert state.curve == CURVE.cut(4), "nobody asked again"


def test_of_two_compactions_before_the_answer_the_deeper_one_counts() -> None:
    state = governed()
    state.ask(330)
    state.compacted(330, blocks=4, whole=10)
    state.compacted(400, blocks=5, whole=6)
    state.answer(CURVE)
    assert state.curve == CURVE.cut(4)


def test_under_pressure_nobody_looks_again_until_the_request_has_doubled() -> None:
    state = governed()
    assert state.wants_look(320, 320, SIZE)
    state.ask(320)
    assert not state.wants_look(320, 320, SIZE), "one question at a time"
    state.answer(CURVE)
    assert not state.wants_look(639, 639, SIZE)
    assert state.wants_look(640, 640, SIZE)
    assert not governed(dealing="equal").wants_look(320, 320, SIZE)


def test_coverage_needs_newer_answers() -> None:
    state = governed(coverage=0.9)
    state.ask(320)
    state.answer(CURVE)
    assert not state.wants_look(320 + 63, 320 + 63, SIZE)
    assert state.wants_look(320 + 64, 320 + 64, SIZE)


def test_an_answer_that_nobody_asked_for_is_ignored() -> None:
    state = governed()
    state.ask(330)
    state.start_over()
    state.answer(CURVE)
    assert state.curve is None


def test_what_was_lost_counts_in_later_curves() -> None:
    state = governed()
    state.ask(320)
    state.answer(CURVE)
    state.compacted(320, blocks=4, whole=10)
    assert state.curve is not None and state.curve.retained == pytest.approx(0.86)
    # As many tokens again: of the whole, half was cut to 0.86 and half is all there.
    state.ask(640)
    state.answer(CURVE)
    assert state.curve.retained == pytest.approx(0.93)


def test_blocks_newer_than_the_curve_are_worth_what_tokens_are_worth_on_average() -> None:
    state = governed()
    state.ask(320)
    state.answer(CURVE)
    holding = state.holding("r", held=13, logical_len=400, resident_len=400, block_size=SIZE)
    assert (holding.fixed, holding.floor, holding.age) == (1, 2, None), "the last block is half filled"
    assert holding.curve is not None and (holding.curve.held, holding.curve.retained) == (12, pytest.approx(1.0))
    # 80 of 400 tokens fill two blocks: a tenth each, dearer than the worst old ones, which lost a fifth of their worth.
    assert holding.price(13) == pytest.approx(0.8 * 0.01)
    assert sorted(holding.price(kept) for kept in range(13, 1, -1))[-4:] == pytest.approx([0.1, 0.1, 0.16, 0.4])
    state.compacted(400, blocks=4, whole=12)
    assert state.curve is not None
    assert (state.curve.held, state.curve.retained) == (4, pytest.approx(0.8 * 0.7 + 0.2))
    after = state.holding("r", held=5, logical_len=410, resident_len=4 * SIZE + 10, block_size=SIZE)
    assert (after.fixed, after.age) == (1, 10)


def test_a_half_filled_block_is_fixed_without_a_curve() -> None:
    holding = governed().holding("r", held=4, logical_len=100, resident_len=100, block_size=SIZE)
    assert holding.fixed == 1


def test_coverage_decides_what_a_request_deserves() -> None:
    state = governed(coverage=0.9)
    state.ask(320)
    state.answer(CURVE)
    holding = state.holding("r", held=10, logical_len=320, resident_len=320, block_size=SIZE)
    assert (holding.floor, holding.deserved) == (2, 5)


def test_a_skipped_compaction_is_not_tried_again_at_once() -> None:
    state = governed()
    state.skipped(300)
    assert state.holding("r", held=10, logical_len=310, resident_len=310, block_size=SIZE).age == 10
    state.start_over()
    assert state.holding("r", held=10, logical_len=310, resident_len=310, block_size=SIZE).age is None
