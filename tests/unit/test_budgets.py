# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How much is kept and when, and the bound that admission relies on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_vllm.memory.admission import peak_blocks, reserve_blocks
from deltamem_vllm.memory.budgets import FixedBudget, cdiv

BUDGET = FixedBudget(keep_ratio=0.1, min_tokens=256, sink_tokens=4, recent_tokens=32, interval=128)

budgets = st.builds(
    FixedBudget,
    keep_ratio=st.floats(0.01, 1.0),
    min_tokens=st.integers(0, 600),
    sink_tokens=st.integers(0, 8),
    recent_tokens=st.integers(1, 64),
    interval=st.integers(1, 256),
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
        assert target >= min(logical, budget.keep_ratio * logical - 1e-6)
    resident = data.draw(st.integers(1, logical))
    keep = budget.due(logical, resident, 32)
    assert keep is None or (keep == target and cdiv(keep, 32) < cdiv(resident, 32))


@given(budgets, st.integers(1, 4000), st.integers(0, 500), st.sampled_from([16, 32, 64]), st.integers(16, 512))
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


def test_reserve_is_zero_for_what_is_never_compacted():
    assert reserve_blocks(None, 4096, 32) == 0
    assert reserve_blocks(BUDGET, 200, 32) == 0
    assert reserve_blocks(BUDGET, 4096, 32) == 13


def test_policy_off_needs_every_token():
    assert peak_blocks(None, 1000, 24, 32, 512, 4096) == 32
    assert peak_blocks(None, 4000, 500, 32, 512, max_model_len=4096) == 128
