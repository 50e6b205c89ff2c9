# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Who gives memory back when the pool fills, in cases small enough to work out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.pressure import Holding, Pool, PressureRule, relieve, spare_blocks, take_cheapest

RULE = PressureRule(high_watermark=0.9, low_watermark=0.8, rest_tokens=128)
EASY = UtilityCurve((2, 20), (0.98, 1.0))
DENSE = UtilityCurve((2, 20), (0.1, 1.0))


def holding(name, held=20, fixed=0, floor=2, deserved=None, curve=None, age=None):
    return Holding(name, held, fixed, floor, floor if deserved is None else deserved, curve, age)


def test_with_room_nothing_is_evicted():
    assert relieve([holding("a")], Pool(100, used=80, needed=10), RULE) == {}
    assert relieve([], Pool(100, used=99, needed=9), RULE) == {}


def test_above_the_high_watermark_memory_is_taken_down_to_the_low_one():
    assert relieve([holding("a")], Pool(100, used=81, needed=10), RULE) == {"a": 9}


def test_the_request_with_useless_blocks_gives_them():
    both = [holding("dense", curve=DENSE), holding("easy", curve=EASY)]
    assert relieve(both, Pool(100, used=91, needed=0), RULE) == {"easy": 9}
    assert relieve(both, Pool(100, used=110, needed=0), RULE) == {"easy": 2, "dense": 8}


def test_a_waiting_request_makes_the_others_shrink():
    assert relieve([holding("a")], Pool(100, used=60, needed=1, waiting=30), RULE) == {"a": 9}


def test_a_request_that_gives_gives_a_good_part():
    three = [holding(name) for name in "abc"]
    pool = Pool(100, used=92, needed=0)
    assert relieve(three, pool, RULE) == {"a": 14, "b": 14}, "two of a quarter each, and the rest from the same two"
    assert relieve(three, pool, replace(RULE, good_gain=0.6)) == {"a": 8}


def test_small_parts_are_taken_where_good_ones_do_not_suffice():
    near_floor = [holding(name, floor=17) for name in "abc"]
    assert relieve(near_floor, Pool(100, used=92, needed=0), RULE) == {"a": 17, "b": 17, "c": 17}
    # One of four gives a good part, and that is enough to come below the high watermark.
    assert relieve([*near_floor, holding("d", floor=15)], Pool(100, used=92, needed=0), RULE) == {"d": 15}


def test_equal_requests_share_what_is_taken_block_by_block():
    three = [holding(name) for name in "abc"]
    assert take_cheapest(three, 12, lambda h: h.floor, lambda h: 1) == {"a": 4, "b": 4, "c": 4}


def test_without_a_curve_each_block_is_worth_its_part_of_the_request():
    assert relieve([holding("short", held=10), holding("long", held=40)], Pool(100, 91, 0), RULE) == {"long": 29}


def test_blocks_nobody_has_judged_stay():
    assert relieve([holding("a", fixed=15)], Pool(100, used=100, needed=0), RULE) == {"a": 15}
    assert holding("a", fixed=5, curve=DENSE.cut(15)).price(20) == pytest.approx(DENSE.marginal(15))
    with pytest.raises(ValueError, match="ends at 20 blocks, but 25 of 30"):
        holding("a", held=30, fixed=5, curve=DENSE)


def test_floors_hold_even_when_the_step_does_not_fit():
    assert relieve([holding("a", floor=18)], Pool(100, used=100, needed=50), RULE) == {"a": 18}
    assert relieve([holding("a", held=3, floor=3)], Pool(100, used=100, needed=50), RULE) == {}


def test_a_request_rests_after_a_compaction_unless_the_step_would_not_fit():
    pair = [holding("new", curve=EASY, age=127), holding("old", curve=DENSE, age=128)]
    assert relieve(pair, Pool(100, used=92, needed=0), RULE) == {"old": 8}
    assert relieve(pair[:1], Pool(100, used=92, needed=8), RULE) == {}
    assert relieve(pair[:1], Pool(100, used=92, needed=9), RULE) == {"new": 2}


def test_what_coverage_grants_is_kept_while_the_step_fits():
    granted = [holding("a", deserved=15)]
    assert relieve(granted, Pool(100, used=100, needed=0), RULE) == {"a": 15}
    assert relieve(granted, Pool(100, used=100, needed=6), RULE) == {"a": 2}
    assert spare_blocks([holding("a", deserved=15), holding("b", fixed=18), holding("c", held=1)]) == 7


def test_a_few_blocks_of_many_are_not_worth_a_compaction():
    large = [holding("a", held=400, curve=UtilityCurve((2, 400), (0.2, 1.0))), holding("b", curve=EASY)]
    pool = Pool(1000, used=920, needed=0)
    alone = Pool(1000, used=805, needed=100)
    assert relieve(large, pool, RULE) == {"a": 298, "b": 2}
    # Of the 21 blocks wanted, b has 18 and a would give 3 of 400.
    few = PressureRule(high_watermark=0.9, low_watermark=0.899, rest_tokens=0)
    assert relieve(large, Pool(1000, used=920, needed=0), few) == {"b": 2}
    assert relieve(large, Pool(1000, used=1010, needed=10), few) == {"a": 297, "b": 2}
    assert relieve(large[:1], alone, few) == {}
    assert relieve(large[:1], Pool(1000, used=805, needed=200), few)["a"] < 400


@pytest.mark.parametrize("numbers", [(5, 6, 1, 1), (5, -1, 1, 1), (5, 0, 0, 1), (5, 0, 3, 2)])
def test_impossible_holdings_are_refused(numbers):
    with pytest.raises(ValueError, match="fixed <= held"):
        Holding("a", *numbers)
