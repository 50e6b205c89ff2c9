# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How much is kept and when, and the bound that admission relies on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.memory.admission import FORESEEN_TOKENS, Ahead, blocks_ahead, peak_blocks, reserve_blocks
from deltamem_vllm.memory.budgets import DealtBudget, FixedBudget, budget_for, cdiv, coverage_blocks
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.request_options import RequestOptions

BUDGET = FixedBudget(keep_ratio=0.1, min_tokens=256, sink_tokens=4, recent_tokens=32, interval=128)

DEALT = DealtBudget(keep_ratio=0.1, min_tokens=256, sink_tokens=4, recent_tokens=8, interval=128)
CURVE = UtilityCurve((1, 10, 32), (0.5, 0.9, 1.0))

fields = {
    "keep_ratio": st.floats(0.01, 1.0),
    "min_tokens": st.integers(0, 600),
    "sink_tokens": st.integers(0, 8),
    "recent_tokens": st.integers(1, 64),
    "interval": st.integers(1, 256),
    "keep_tokens": st.none() | st.integers(1, 2000),
}
budgets = st.builds(FixedBudget, **fields)
dealt_budgets = st.builds(
    DealtBudget, **fields, coverage=st.none() | st.floats(0.01, 1), max_keep_ratio=st.floats(0.01, 1)
)


@pytest.mark.parametrize(
    ("logical", "target"),
    [(255, 255), (256, 36), (1000, 100), (4096, 410), (40960, 4096)],
)
def test_target(logical, target):
    assert BUDGET.target(logical) == target


def test_a_ratio_of_one_never_compacts():
    keep_all = replace(BUDGET, keep_ratio=1.0)
    assert all(keep_all.due(n, n, 32) is None for n in range(1, 3000, 7))


def test_first_compaction_is_immediate_and_later_ones_wait_for_the_interval():
    assert BUDGET.due(1000, 1000, 32) == 100
    assert BUDGET.due(1100, 200, 32) is None  # 90 over its target of 110
    assert BUDGET.due(1150, 250, 32) == 115


def test_nothing_is_done_for_less_than_a_block():
    assert BUDGET.due_when_short(320, 60, 64) is None


@given(budgets, st.integers(1, 5000), st.data())
def test_target_is_bounded_by_protection_and_length(budget, logical, data):
    target = budget.target(logical)
    assert 1 <= target <= logical
    if logical >= budget.min_tokens:
        assert target >= min(logical, budget.sink_tokens + budget.recent_tokens)
        share = budget.keep_ratio * logical - 1e-6 if budget.keep_tokens is None else budget.keep_tokens
        assert target >= min(logical, share)
    resident = data.draw(st.integers(1, logical))
    keep = budget.due(logical, resident, 32)
    assert keep is None or (keep == target and cdiv(keep, 32) < cdiv(resident, 32))


@given(
    budgets | dealt_budgets,
    st.integers(1, 4000),
    st.integers(0, 500),
    st.sampled_from([16, 32, 64]),
    st.integers(16, 512),
)
def test_peak_covers_a_request_that_is_compacted_whenever_a_chunk_does_not_fit(budget, prompt, new, block, chunk):
    """Play the request alone in a pool of exactly peak_blocks: it must never need one more."""
    peak = peak_blocks(budget, prompt, new, block, chunk, max_model_len=100_000)
    assert peak <= cdiv(prompt + new, block)
    logical = resident = 0
    while logical < prompt + new:
        step = min(chunk, prompt - logical) if logical < prompt else 1
        keep = budget.due(logical, resident, block) if logical >= prompt else None
        if keep is None and cdiv(resident + step, block) > peak:
            keep = budget.due_when_short(logical, resident, block)
        if keep is not None:
            resident = keep
        logical, resident = logical + step, resident + step
        assert cdiv(resident, block) <= peak


def test_a_number_of_tokens_replaces_the_share():
    fixed, dealt = replace(BUDGET, keep_tokens=300), replace(DEALT, keep_tokens=300)
    assert [fixed.target(n) for n in (200, 300, 301, 9000)] == [200, 300, 300, 300]
    assert [dealt.least_blocks(n, 32) for n in (200, 300, 301, 9000)] == [7, 10, 9, 9]


@pytest.mark.parametrize(
    ("logical", "blocks"),
    [
        (255, 8),  # left alone
        (256, 1),  # 25 tokens are less than a block, and the floor is one
        (640, 2),
        (959, 2),  # 95 tokens: not the third block
        (960, 3),
        (10_240, 32),  # 0.1 * 10240 is 1024.0000000000002 or a little less: no block may be lost to it
    ],
)
def test_dealt_budgets_count_whole_blocks_and_round_down(logical, blocks):
    assert DEALT.least_blocks(logical, 32) == DEALT.target_blocks(logical, 32) == blocks


def test_every_pair_has_room_for_its_protected_tokens():
    assert [replace(DEALT, recent_tokens=r).floor_blocks(16) for r in (1, 12, 13, 60)] == [1, 1, 2, 4]
    assert replace(DEALT, sink_tokens=0, recent_tokens=40).least_blocks(300, 16) == 3


def test_a_dealt_budget_is_due_when_it_frees_a_block():
    assert DEALT.due(1000, 1000, 32) == 96
    assert DEALT.due(1100, 196, 32) is None  # 100 over its 96 tokens
    assert DEALT.due(1100, 224, 32) == 96
    assert DEALT.due_when_short(1100, 97, 32) == 96
    assert DEALT.due_when_short(1100, 96, 32) is None
    keep_all = replace(DEALT, keep_ratio=1.0)
    assert all(keep_all.due(n, n, 32) is None for n in range(1, 3000, 7))


def test_coverage_lets_content_decide_between_two_bounds():
    assert coverage_blocks(CURVE, 0.9, least=2, most=32) == 10
    assert coverage_blocks(CURVE, 0.4, least=2, most=32) == 2
    assert coverage_blocks(CURVE, 1.0, least=2, most=20) == 20
    assert coverage_blocks(CURVE, 0.9, least=2, most=32, newer=3) == 13
    budget = replace(DEALT, coverage=0.9, max_keep_ratio=0.5)
    assert (budget.least_blocks(1024, 32), budget.most_blocks(1024, 32)) == (3, 16)
    assert budget.due(1024, 1024, 32, CURVE) == 320
    assert budget.due(1024, 1024, 32) == 512, "unseen, it deserves the most it may"
    assert replace(budget, max_keep_ratio=1.0).due(1024, 1024, 32) is None
    assert budget.due_when_short(1024, 1024, 32) == 96


def test_coverage_keeps_what_nobody_has_scored():
    budget = replace(DEALT, coverage=0.9)
    cut = CURVE.cut(10)
    assert budget.due(1124, 420, 32, cut) is None, "four blocks were written since"
    assert not budget.wants_curve(420, 32, cut)
    assert budget.wants_curve(448, 32, cut)
    assert budget.wants_curve(448, 32, None)
    assert not DEALT.wants_curve(448, 32, None)
    assert not BUDGET.wants_curve(448, 32, None)


@given(dealt_budgets, st.integers(1, 5000), st.sampled_from([16, 32, 64]), st.none() | st.just(CURVE), st.data())
def test_dealt_budgets_keep_to_their_bounds(budget, logical, block, curve, data):
    least, most = budget.least_blocks(logical, block), budget.most_blocks(logical, block)
    target = budget.target_blocks(logical, block, curve)
    assert 1 <= least <= target <= most <= cdiv(logical, block)
    if logical > budget.untouched_tokens:
        assert least >= min(budget.floor_blocks(block), cdiv(logical, block))
        assert budget.keep_ratio == 1 or least <= max(budget.target(logical) // block, budget.floor_blocks(block))
    resident = data.draw(st.integers(1, logical))
    for keep in (budget.due(logical, resident, block, curve), budget.due_when_short(logical, resident, block)):
        if keep is not None:
            assert keep % block == 0 and block <= keep < resident
            assert keep // block < cdiv(resident, block)


def test_the_dealing_of_a_request_decides_how_it_is_counted():
    config = DeltaMemConfig(coverage=0.9, max_keep_ratio=0.5)

    def made(**extra):
        extra = {f"deltamem_{key}": value for key, value in extra.items()}
        return budget_for(RequestOptions.from_extra_args(extra, config), config)

    assert made() == DealtBudget(0.1, 256, 4, 8, 128, coverage=0.9, max_keep_ratio=0.5)
    assert made(coverage="off", dealing="profile", keep_tokens=64) == DealtBudget(
        0.1, 256, 4, 8, 128, keep_tokens=64, max_keep_ratio=0.5
    )
    assert made(coverage="off", dealing="equal") == FixedBudget(0.1, 256, 4, 8, 128)
    assert made(policy="off") is None


def test_reserve_is_zero_for_what_is_never_compacted():
    assert reserve_blocks(None, 4096, 32) == 0
    assert reserve_blocks(BUDGET, 200, 32) == 0
    assert reserve_blocks(BUDGET, 4096, 32) == 13
    assert reserve_blocks(DEALT, 4096, 32) == 12
    assert reserve_blocks(replace(DEALT, keep_ratio=1.0), 4100, 32) == 0


def test_policy_off_needs_every_token():
    assert peak_blocks(None, 1000, 24, 32, 512, 4096) == 32
    assert peak_blocks(None, 4000, 500, 32, 512, max_model_len=4096) == 128


def test_what_is_ahead_is_the_least_at_the_end_and_a_block_to_write_to():
    assert blocks_ahead(DEALT, 256, 768, 32, 8192) == Ahead(least=3 + 1, whole=32)  # 102 of 1024 tokens: 3 whole blocks
    assert blocks_ahead(DEALT, 100, 100, 32, 8192) == Ahead(least=7, whole=7)  # never compacted
    allowed = blocks_ahead(DEALT, 256, 100_000, 32, 200_000)
    assert allowed == blocks_ahead(DEALT, 256, FORESEEN_TOKENS, 32, 200_000)
    assert blocks_ahead(DEALT, 256, 768, 32, 512).whole == 16
