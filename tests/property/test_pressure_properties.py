# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Mode ``pressure`` on random pools: never below a floor, never without need, always where it costs least."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import given as given_by_hypothesis
from hypothesis import strategies as st

from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.pressure import Holding, Pool, PressureRule, relieve, spare_blocks, take_cheapest

# On a busy machine examples take long, which says nothing about what they show.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def given(*strategies):
    return lambda test: UNTIMED(given_by_hypothesis(*strategies)(test))


@st.composite
def concave_curves(draw, held):
    """What dealing gives: the best pages first, so that each further block adds no more than the one before.

    Multiples of 1/1024 keep sums exact: equal prices are then equal."""
    steps = sorted(draw(st.lists(st.integers(0, 64), min_size=held, max_size=held)), reverse=True)
    lost = 1024 - draw(st.integers(sum(steps), max(sum(steps), 1024)))
    mass, total = [], 1024 - lost - sum(steps)
    for step in steps:
        total += step
        mass.append(total / 1024)
    return UtilityCurve(tuple(range(1, held + 1)), tuple(mass))


@st.composite
def holdings(draw, most_requests=8, most_blocks=16, most_fixed=4):
    made = []
    for i in range(draw(st.integers(1, most_requests))):
        judged = draw(st.integers(1, most_blocks))
        fixed = draw(st.integers(0, most_fixed))
        floor = draw(st.integers(1, most_blocks))
        made.append(
            Holding(
                request_id=f"r{i}",
                held=judged + fixed,
                fixed=fixed,
                floor=floor,
                deserved=draw(st.integers(floor, most_blocks + 4)),
                curve=draw(st.none() | concave_curves(judged)),
                age=draw(st.none() | st.integers(0, 20)),
            )
        )
    return made


@st.composite
def pools(draw, running):
    used = sum(h.held for h in running) + draw(st.integers(0, 20))
    blocks = draw(st.integers(used, 2 * used))
    return Pool(blocks, used, needed=draw(st.integers(0, 20)), waiting=draw(st.integers(0, 20)))


@st.composite
def rules(draw):
    low, high = sorted(draw(st.lists(st.integers(1, 20), min_size=2, max_size=2, unique=True)))
    least = draw(st.sampled_from([0, 1 / 16, 0.3]))
    good = draw(st.sampled_from([least, 0.5]))
    return PressureRule(high / 20, low / 20, draw(st.integers(0, 20)), good, least)


BLOCK_BY_BLOCK = {"good_gain": 0, "least_gain": 0}


def to_floor(h: Holding) -> int:
    return h.floor


def one(h: Holding) -> int:
    return 1


def spare(h: Holding, least: int) -> int:
    return max(h.held - max(least, h.fixed), 0)


def cost(running: list[Holding], taken: dict[str, int]) -> float:
    return sum(h.price(kept) for h in running for kept in range(h.held, h.held - taken.get(h.request_id, 0), -1))


def after(running: list[Holding], pool: Pool, keep: dict[str, int]) -> tuple[list[Holding], Pool]:
    """The next step, if nothing but these compactions happens."""
    left = []
    for h in running:
        if h.request_id in keep:
            kept = keep[h.request_id]
            curve = h.curve.cut(kept - h.fixed) if h.curve is not None and kept > h.fixed else None
            h = replace(h, held=kept, age=0, curve=curve)
        left.append(h)
    freed = sum(h.held for h in running) - sum(h.held for h in left)
    return left, replace(pool, used=pool.used - freed)


@given(st.data())
def test_bounds_hold_and_memory_is_only_taken_when_it_is_wanted(data):
    running = data.draw(holdings())
    pool, rule = data.draw(pools(running)), data.draw(rules())
    keep = relieve(running, pool, rule)
    by_name = {h.request_id: h for h in running}
    for name, kept in keep.items():
        assert max(by_name[name].floor, by_name[name].fixed) <= kept < by_name[name].held
    if pool.above(rule.high_watermark) <= 0:
        assert keep == {}
    freed = sum(by_name[name].held - kept for name, kept in keep.items())
    assert freed <= max(pool.above(rule.low_watermark), 0)
    if any(kept < by_name[name].deserved or not rule.is_rested(by_name[name]) for name, kept in keep.items()):
        assert pool.short > 0, "rest and coverage give way only to a step that does not fit"


@given(st.data())
def test_it_reaches_the_low_watermark_or_leaves_nothing_to_take(data):
    running = data.draw(holdings())
    pool, rule = data.draw(pools(running)), replace(data.draw(rules()), **BLOCK_BY_BLOCK, rest_tokens=0)
    assume(pool.above(rule.high_watermark) > 0)
    left, relieved = after(running, pool, relieve(running, pool, rule))
    assert (
        relieved.above(rule.low_watermark) == 0
        or spare_blocks(left) == 0
        and (relieved.short <= 0 or all(spare(h, h.floor) == 0 for h in left))
    )


@given(st.data())
def test_a_step_fits_whenever_floors_let_it(data):
    running = data.draw(holdings())
    pool, rule = data.draw(pools(running)), data.draw(rules())
    possible = sum(spare(h, h.floor) for h in running)
    _, relieved = after(running, pool, relieve(running, pool, rule))
    assert relieved.short <= max(pool.short - possible, 0)


@given(holdings(most_requests=3, most_blocks=6), st.integers(0, 20))
def test_what_is_taken_is_the_cheapest_of_all_choices(running, count):
    taken = take_cheapest(running, count, to_floor, one)
    most = [spare(h, h.floor) for h in running]
    count = min(count, sum(most))
    assert sum(taken.values()) == count
    choices = product(*(range(m + 1) for m in most))
    names = [h.request_id for h in running]
    cheapest = min(cost(running, dict(zip(names, c, strict=True))) for c in choices if sum(c) == count)
    assert cost(running, taken) == pytest.approx(cheapest, abs=1e-9)


@given(holdings(), st.integers(0, 60), st.integers(0, 60))
def test_more_demand_takes_no_less_from_anyone(running, count, more):
    few, many = take_cheapest(running, count, to_floor, one), take_cheapest(running, count + more, to_floor, one)
    assert all(many.get(name, 0) >= blocks for name, blocks in few.items())


@given(holdings(), st.integers(0, 60), st.sampled_from([0.2, 0.25, 0.5]))
def test_parts_are_taken_whole_and_never_more_than_is_wanted(running, count, share):
    def part(h):
        return max(int(share * h.held), 1)

    taken = take_cheapest(running, count, to_floor, part)
    left_over = count - sum(taken.values())
    assert left_over >= 0
    for h in running:
        gives, could = taken.get(h.request_id, 0), spare(h, h.floor)
        assert gives == 0 or part(h) <= gives <= could
        if left_over and gives:
            assert gives == could, "what is left to take comes from those who gave already"
        elif left_over:
            assert part(h) > min(could, left_over)


@given(st.data())
def test_the_same_decision_is_not_made_twice(data):
    running = data.draw(holdings())
    pool, rule = data.draw(pools(running)), data.draw(rules())
    if pool.short > 0:
        # A step that must fit may cut requests that nothing else would have cut, and leave out small gains: others may
        # then be worth a compaction of their own.
        rule = replace(rule, **BLOCK_BY_BLOCK)
    left, relieved = after(running, pool, relieve(running, pool, rule))
    assert relieve(left, relieved, rule) == {}


@given(st.data())
def test_the_order_of_requests_only_breaks_ties(data):
    running = data.draw(holdings())
    count = data.draw(st.integers(0, 60))
    there, back = take_cheapest(running, count, to_floor, one), take_cheapest(running[::-1], count, to_floor, one)
    assert cost(running, there) == pytest.approx(cost(running, back), abs=1e-9)
