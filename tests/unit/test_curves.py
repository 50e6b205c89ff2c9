# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The share of a request's utility that a number of blocks retains."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_vllm.memory.curves import MOST_POINTS, UtilityCurve, still_held

CURVE = UtilityCurve((2, 4, 10), (0.5, 0.9, 1.0))


@st.composite
def curves(draw):
    blocks = sorted(draw(st.sets(st.integers(1, 200), min_size=1, max_size=12)))
    mass = sorted(draw(st.lists(st.floats(0, 1), min_size=len(blocks), max_size=len(blocks))))
    return UtilityCurve(tuple(blocks), tuple(mass))


@pytest.mark.parametrize(
    ("blocks", "mass"), [(-1, 0), (0, 0), (1, 0.25), (2, 0.5), (3, 0.7), (4, 0.9), (7, 0.95), (10, 1), (11, 1)]
)
def test_it_is_straight_between_points_and_flat_beyond_them(blocks, mass):
    assert CURVE.at(blocks) == pytest.approx(mass)


@pytest.mark.parametrize(
    ("coverage", "blocks"), [(0.0, 0), (0.01, 1), (0.5, 2), (0.51, 3), (0.9, 4), (0.99, 10), (1, 10)]
)
def test_fewest_blocks_that_cover(coverage, blocks):
    assert CURVE.fewest(coverage) == blocks


def test_a_block_costs_what_its_absence_loses():
    assert [CURVE.marginal(b) for b in (10, 4, 1, 11)] == pytest.approx([0.1 / 6, 0.2, 0.25, 0])


def test_after_a_cut_what_was_lost_stays_lost():
    cut = CURVE.cut(3)
    assert (cut.held, cut.retained) == (3, pytest.approx(0.7))
    assert cut.at(10) == cut.retained
    assert cut.fewest(0.99) == 3, "more than it holds cannot be asked for"
    assert CURVE.cut(10) == CURVE.cut(99) == CURVE
    assert CURVE.cut(1).blocks == (1,)
    with pytest.raises(ValueError, match="at least 1 block, got 0"):
        CURVE.cut(0)


def test_a_new_report_of_a_compacted_request_is_a_share_of_what_it_has_left():
    assert CURVE.scaled(0.5) == UtilityCurve((2, 4, 10), (0.25, 0.45, 0.5))
    with pytest.raises(ValueError, match="got 1.5"):
        CURVE.scaled(1.5)


def test_a_loss_weighs_less_as_a_request_grows():
    assert still_held(1.0, 100, 300) == 1
    assert still_held(0.7, 100, 100) == pytest.approx(0.7)
    assert still_held(0.7, 100, 300) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("blocks", "mass", "words"),
    [
        ((), (), "1 to 64 points"),
        ((1, 2), (1.0,), "2 blocks and 1 masses"),
        (tuple(range(1, MOST_POINTS + 2)), (1.0,) * (MOST_POINTS + 1), "1 to 64 points"),
        ((0, 2), (0.5, 1.0), "ascending from at least 1"),
        ((2, 2), (0.5, 1.0), "ascending from at least 1"),
        ((1, 2), (0.6, 0.5), "must not decrease"),
        ((1, 2), (-0.1, 0.5), "must not decrease"),
        ((1, 2), (0.5, 1.1), "must not decrease"),
        ((1, 2), (math.nan, 1.0), "must not decrease"),
        ((1, 2), (0.5, math.nan), "must not decrease"),
    ],
)
def test_a_curve_that_is_none_is_refused(blocks, mass, words):
    with pytest.raises(ValueError, match=words):
        UtilityCurve(blocks, mass)


@given(curves(), st.floats(0, 1), st.integers(1, 210))
def test_it_never_falls_and_fewest_is_its_inverse(curve, coverage, blocks):
    values = [curve.at(b) for b in range(curve.held + 2)]
    assert values == sorted(values)
    fewest = curve.fewest(coverage)
    if coverage <= curve.retained:
        assert curve.at(fewest) >= coverage
        assert fewest == 0 or curve.at(fewest - 1) < coverage
    else:
        assert fewest == curve.held
    cut = curve.cut(blocks)
    assert cut.held == min(blocks, curve.held)
    assert [cut.at(b) for b in range(cut.held + 1)] == pytest.approx(values[: cut.held + 1])


def test_a_request_that_grows_has_more_blocks_and_its_old_ones_weigh_less():
    grown = CURVE.grown(4, 0.2)
    # 0.05 a block: cheaper than the first stretches, dearer than the last one.
    assert grown.blocks == (2, 4, 8, 14)
    assert grown.mass == pytest.approx((0.4, 0.72, 0.92, 1.0))
    assert CURVE.grown(0, 0.0) == CURVE
    assert CURVE.grown(10, 0.01).mass[-2:] == pytest.approx((0.99, 1.0)), "cheapest of all: given up first"
    with pytest.raises(ValueError, match="got 1.2"):
        CURVE.grown(1, 1.2)


@given(curves(), st.integers(1, 50), st.floats(0, 1))
def test_growth_adds_its_share_and_keeps_the_number_of_points(curve, blocks, share):
    grown = curve.grown(blocks, share)
    assert grown.held == curve.held + blocks
    assert grown.retained == pytest.approx(curve.retained * (1 - share) + share)
    assert len(grown.blocks) <= len(curve.blocks) + 1


def test_a_curve_of_most_points_loses_its_straightest_one_when_it_grows():
    points = tuple(range(1, MOST_POINTS + 1))
    full = UtilityCurve(points, tuple(1 - (1 - b / MOST_POINTS) ** 2 for b in points))
    grown = full.grown(2, 0.01)
    assert len(grown.blocks) == MOST_POINTS
    assert grown.held == MOST_POINTS + 2
    for kept in (10, 30, 50):  # the new ones, 0.005 each, come behind them
        assert grown.at(kept) == pytest.approx(0.99 * full.at(kept), abs=1e-3)


@given(curves(), st.integers(1, 200))
def test_the_slope_is_the_price_of_each_block_of_its_stretch(curve, blocks):
    price, number = curve.slope(blocks)
    assert 1 <= number <= blocks
    for block in {blocks, blocks - number + 1}:
        assert curve.marginal(block) == pytest.approx(price, abs=1e-9)
