# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Moving tokens between pages: the fast version against the one-token-at-a-time definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.ops.inputs import LAYOUTS, make_layout, make_paged_tokens
from deltamem_vllm.ops.layout import probe_layout
from deltamem_vllm.ops.pages import PageMover, take_tokens
from deltamem_vllm.ops.reference import move_survivors, read_token


def writer(layout):
    def write(key, value, cache, slots):
        for token, slot in enumerate(slots.tolist()):
            for head in range(cache.shape[1]):
                page = cache[0, head].view(-1)
                page[layout.keys[slot]] = key[token, head]
                page[layout.values[slot]] = value[token, head]

    return write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_probe_recovers_the_layout_the_writer_uses(name, dtype):
    layout = make_layout(name, block_size=32, dim=64)
    cache = torch.zeros(2, 2, 32, 128, dtype=dtype)
    probed = probe_layout(writer(layout), cache)
    assert torch.equal(probed.keys, layout.keys)
    assert torch.equal(probed.values, layout.values)


def test_probe_refuses_a_writer_that_drops_elements():
    layout = make_layout("slot_major", block_size=16, dim=32)
    broken = type(layout)(layout.keys, layout.keys)  # values overwrite keys
    with pytest.raises(RuntimeError, match="not supported by deltamem"):
        probe_layout(writer(broken), torch.zeros(1, 1, 16, 64))


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 70),
    share=st.floats(0.01, 1.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    in_place=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_moving_survivors_equals_the_definition(layout, heads, tokens, share, dtype, in_place, seed):
    keep = max(1, int(tokens * share))
    case = make_paged_tokens(layout, heads, 8, 16, tokens, keep, dtype, seed)
    count = -(-keep // 16)
    target = case.source[:count] if in_place else case.spare[:count]
    expected = move_survivors(case.cache, case.layout, case.source, target, case.survivors)

    mover = PageMover(case.layout)
    cache = case.cache.clone()
    keys, values = mover.read(cache, torch.tensor(case.source), tokens)
    picked = (take_tokens(keys, case.survivors), take_tokens(values, case.survivors))
    mover.write(cache, torch.tensor(target), *picked)

    # A copy must be bit-exact, and blocks that are not the plan's must keep their bytes (NaN included).
    assert torch.equal(torch.nan_to_num(cache, nan=7e4), torch.nan_to_num(expected, nan=7e4))


def test_a_survivor_taken_from_the_wrong_slot_is_seen():
    """The control: the comparison above fails if one index is off by one."""
    case = make_paged_tokens("keys_transposed", 2, 8, 16, 40, 9, torch.float32, seed=3)
    shifted = case.survivors.clone()
    shifted[1, 4] = (shifted[1, 4] + 1) % 40
    right = move_survivors(case.cache, case.layout, case.source, case.spare[:1], case.survivors)
    wrong = move_survivors(case.cache, case.layout, case.source, case.spare[:1], shifted)
    assert not torch.equal(torch.nan_to_num(right), torch.nan_to_num(wrong))


def test_unused_slots_of_the_last_block_are_zero():
    case = make_paged_tokens("keys_transposed", 2, 8, 16, 40, 18, torch.float32, seed=5)
    cache = case.cache.clone()
    mover = PageMover(case.layout)
    keys, values = mover.read(cache, torch.tensor(case.source), 40)
    target = torch.tensor(case.spare[:2])
    mover.write(cache, target, take_tokens(keys, case.survivors), take_tokens(values, case.survivors))
    for slot in range(2, 16):
        key, value = read_token(cache, case.layout, case.spare[1], slot, head=1)
        assert not key.any() and not value.any()
