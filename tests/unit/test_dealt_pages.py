# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Moving tokens between pages of the whole pool: the fast version against the one-token-at-a-time definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import LAYOUTS, DealtTokens, make_dealt_tokens, make_layout
from deltamem_vllm.ops.layout import PageLayout
from deltamem_vllm.ops.reference import move_dealt, read_pooled_token
from tests.support.examples import examples


def move(case: DealtTokens, pool: torch.Tensor, targets: list[list[int]], kept: list[torch.Tensor]) -> None:
    size = case.layout.block_size
    ids = [torch.tensor(pages) for pages in case.pages]
    page = torch.cat([own[index // size] for own, index in zip(ids, kept, strict=True)])
    slot = torch.cat([index % size for index in kept])
    mover = DealtPages(case.layout)
    keys, values = mover.gather(pool, page, slot)
    mover.scatter(pool, torch.tensor([page for pages in targets for page in pages]), keys, values)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a, nan=7e4), torch.nan_to_num(b, nan=7e4))


@settings(max_examples=examples(60), deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    pairs=st.integers(1, 6),
    pages=st.integers(1, 5),
    tail=st.integers(0, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    in_place=st.booleans(),
    offset=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_moving_survivors_equals_the_definition(layout, pairs, pages, tail, dtype, in_place, offset, seed):
    case = make_dealt_tokens(layout, pairs, 8, 16, pages, tail, dtype, seed)
    # In place: pages of one pair become another's.
    ids = [page for own in reversed(case.pages) for page in own] if in_place else case.spare
    targets = case.targets(ids)
    expected = move_dealt(case.pool, case.layout, case.pages, targets, case.kept)
    pool = case.pool.clone()
    if offset:  # a view into a larger allocation, with other bytes between the pages
        whole = torch.full((len(pool) + 1, 2 * pool.shape[1]), 5.0, dtype=dtype)
        view = whole[1:, pool.shape[1] :]
        view.copy_(pool)
        pool = view
    move(case, pool, targets, case.kept)
    # A copy must be bit-exact, and pages that are not the plan's must keep their bytes (NaN included).
    assert same(pool, expected)
    if offset:
        assert (whole[0] == 5.0).all() and (whole[:, : pool.shape[1]] == 5.0).all()


@settings(max_examples=examples(40), deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    heads=st.integers(1, 4),
    pages=st.integers(1, 4),
    tail=st.integers(0, 20),
    seed=st.integers(0, 2**16),
)
def test_reading_equals_the_definition(layout, heads, pages, tail, seed):
    case = make_dealt_tokens(layout, heads, 8, 16, pages, tail, torch.float32, seed)
    longest = max(len(own) for own in case.pages)
    ids = torch.tensor([own + case.spare[:1] * (longest - len(own)) for own in case.pages])  # filled up with NaN pages
    keys, values = DealtPages(case.layout).read(case.pool, ids, case.lengths)
    assert keys.shape == values.shape == (heads, max(case.lengths), 8)
    assert keys.is_contiguous() and values.is_contiguous()
    for head, length in enumerate(case.lengths):
        assert not keys[head, length:].any() and not values[head, length:].any()
        for j in range(length):
            key, value = read_pooled_token(case.pool, case.layout, case.pages[head][j // 16], j % 16)
            assert torch.equal(keys[head, j], key)
            assert torch.equal(values[head, j], value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_length_for_all_heads(layout):
    case = make_dealt_tokens(layout, 3, 8, 16, 1, 21, torch.bfloat16, 1)
    ids = torch.tensor(case.pages)
    mover = DealtPages(case.layout)
    for part, listed in zip(mover.read(case.pool, ids, 37), mover.read(case.pool, ids, case.lengths), strict=True):
        assert part.shape == (3, 37, 8)
        assert torch.equal(part, listed)
    assert torch.equal(mover.read(case.pool, ids.int(), 37)[0], mover.read(case.pool, ids, 37)[0])
    assert mover.read(case.pool, ids, 30)[0].shape == (3, 30, 8)  # fewer tokens than the pages hold


def test_a_survivor_taken_from_the_wrong_slot_is_seen():
    """The control: the comparison fails if one index of one pair is off by one."""
    case = make_dealt_tokens("keys_transposed", 5, 8, 16, 4, 3, torch.float32, seed=3)
    targets = case.targets(case.spare)
    expected = move_dealt(case.pool, case.layout, case.pages, targets, case.kept)
    pair = next(i for i, kept in enumerate(case.kept) if len(kept))
    wrong = [kept.clone() for kept in case.kept]
    wrong[pair][7] = (wrong[pair][7] + 1) % case.lengths[pair]
    pool = case.pool.clone()
    move(case, pool, targets, wrong)
    assert not same(pool, expected)


def test_the_generator_makes_unequal_pairs():
    case = make_dealt_tokens("slot_major", 12, 8, 16, 6, 5, torch.float32, seed=0)
    assert len(set(case.lengths)) > 3
    assert sum(length - 5 for length in case.lengths) == 12 * 6 * 16
    assert sum(map(len, case.kept)) == 12 * 6 // 4 * 16
    ids = [page for own in case.pages for page in own] + case.spare
    assert len(set(ids)) == len(ids) < len(case.pool)
    for own, length in zip(case.pages, case.lengths, strict=True):
        for j in range(len(own) * 16):
            key, value = read_pooled_token(case.pool, case.layout, own[j // 16], j % 16)
            assert bool(key.isnan().all() and value.isnan().all()) == (j >= length)


LAYOUT = make_layout("keys_transposed", 16, 8)
POOL = torch.zeros(6, 256)
IDS = torch.tensor([0, 1])


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda m: m.gather(torch.zeros(6, 255), IDS, IDS), r"must be \[pages, 256\]"),
            (lambda m: m.gather(torch.zeros(256, 6).t(), IDS, IDS), "side by side"),
            (lambda m: m.gather(POOL, IDS.float(), IDS), "page must be int32 or int64"),
            (lambda m: m.gather(POOL, IDS, IDS.view(1, 2)), "slot must be int32 or int64 with 1"),
            (lambda m: m.gather(POOL, IDS, IDS[:1]), "equally long"),
            (lambda m: m.scatter(POOL, IDS, torch.zeros(31, 8), torch.zeros(32, 8)), "keys for 2 pages"),
            (lambda m: m.scatter(POOL, IDS, torch.zeros(32, 8), torch.zeros(32, 8).half()), "values for 2 pages"),
            (lambda m: m.scatter(POOL[0], IDS, torch.zeros(32, 8), torch.zeros(32, 8)), "the pool must be"),
            (lambda m: m.read(POOL, IDS, 4), "pages must be int32 or int64 with 2"),
            (lambda m: m.read(POOL, IDS.view(1, 2), 33), "between 0 and 32"),
            (lambda m: m.read(POOL, IDS.view(1, 2), [-1]), "between 0 and 32"),
            (lambda m: m.read(POOL, IDS.view(1, 2), [3, 4]), "one number or 1"),
        ],
    )
    def test_mistakes(self, call, says):
        with pytest.raises(ValueError, match=says):
            call(DealtPages(LAYOUT))

    def test_nothing_is_written_if_one_part_does_not_fit(self):
        pool = torch.zeros(6, 256)
        with pytest.raises(ValueError, match="values"):
            DealtPages(LAYOUT).scatter(pool, IDS, torch.ones(32, 8), torch.ones(31, 8))
        assert not pool.any()


def test_nothing_to_move():
    mover = DealtPages(PageLayout(LAYOUT.keys, LAYOUT.values))
    none = torch.empty(0, dtype=torch.int64)
    keys, values = mover.gather(POOL, none, none)
    assert keys.shape == values.shape == (0, 8)
    mover.scatter(POOL, none, keys, values)
    assert mover.read(POOL, IDS.view(1, 2), 0)[0].shape == (1, 0, 8)
