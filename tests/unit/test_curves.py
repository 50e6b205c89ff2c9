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
