# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Moving tokens between pages natively: against the one-token-at-a-time definition, at every instruction set."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.ops import dealt_pages, gather, native
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.gather import PoolStrides, gather_pages, gather_tokens, kept_pages
from deltamem_vllm.ops.inputs import LAYOUTS, DealtTokens, make_dealt_tokens, make_layout
from deltamem_vllm.ops.reference import move_dealt, read_pooled_token
from tests.support.examples import examples

ISAS = native.supported_isas()


def places(case: DealtTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and slot of every survivor."""
    size = case.layout.block_size
    page = [torch.tensor(own)[kept // size] for own, kept in zip(case.pages, case.kept, strict=True)]
    return torch.cat(page), torch.cat([kept % size for kept in case.kept])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@settings(max_examples=examples(120), deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    pairs=st.integers(1, 5),
    pages=st.integers(1, 4),
    dim=st.sampled_from([4, 6, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([16, 24, 32, 48, 64, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    name=st.sampled_from(ISAS or ("none",)),
    in_place=st.booleans(),
    offset=st.booleans(),
    shuffled=st.booleans(),
    streamed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_moving_equals_the_definition(
    layout, pairs, pages, dim, block_size, dtype, name, in_place, offset, shuffled, streamed, seed
):
    case = make_dealt_tokens(layout, pairs, dim, block_size, pages, 5, dtype, seed)
    if shuffled:  # survivors are ascending; nothing here may rely on it
        generator = torch.Generator().manual_seed(seed)
        for kept in case.kept:
            kept.copy_(kept[torch.randperm(len(kept), generator=generator)])
    ids = [page for own in reversed(case.pages) for page in own] if in_place else case.spare
    targets = case.targets(ids)
    expected = move_dealt(case.pool, case.layout, case.pages, targets, case.kept)
    page, slot = places(case)
    pool = case.pool.clone()
    if offset:
        whole = torch.full((len(pool), 2 * pool.shape[1]), 5.0, dtype=dtype)
        whole[:, pool.shape[1] :] = pool
        pool = whole[:, pool.shape[1] :]
    with native.using_isa(name), patch.object(gather, "_STREAMED_BYTES", 0 if streamed else 2**60):
        mover = DealtPages(case.layout)
        keys, values = mover.gather(pool, page, slot)
        mover.move(pool, page, slot, torch.tensor([page for own in targets for page in own]), in_place)
    assert same(pool, expected)
    if offset:
        assert (whole[:, : pool.shape[1]] == 5.0).all()
    for k in range(0, len(page), 7):
        key, value = read_pooled_token(case.pool, case.layout, int(page[k]), int(slot[k]))
        assert same(keys[k], key) and same(values[k], value)


def in_one(pool, layout, targets, page, slot):
    """The definition, for tokens that stand anywhere in the pool."""
    every = [list(range(len(pool)))]
    return move_dealt(pool, layout, every, [targets.tolist()], [page * layout.block_size + slot])


@settings(max_examples=examples(150), deadline=None)
@given(
    layout=st.sampled_from(["slot_major", "keys_transposed"]),
    pages=st.integers(1, 24),
    others=st.integers(0, 6),
    kind=st.sampled_from(["permuted", "survivors", "anything"]),
    together=st.sampled_from([1, 2, 5, 64]),
    streamed=st.booleans(),
    threads=st.sampled_from([1, 2]),
    name=st.sampled_from(ISAS or ("none",)),
    seed=st.integers(0, 2**16),
)
def test_pages_that_take_tokens_of_each_other(layout, pages, others, kind, together, streamed, threads, name, seed):
    generator = torch.Generator().manual_seed(seed)
    block, dim, count = 16, 4, pages + others
    paged = make_layout(layout, block, dim)
    pool = torch.randn(count, block * 2 * dim, generator=generator).to(torch.bfloat16)
    targets = torch.randperm(count, generator=generator)[:pages]
    if kind == "permuted":  # cycles of whole pages, of any length
        page = torch.randperm(count, generator=generator)[:pages].repeat_interleave(block)
        slot = torch.arange(block).repeat(pages)
    else:
        kept = torch.randperm(count * block, generator=generator)[: pages * block]
        kept = kept.sort().values if kind == "survivors" else kept
        page, slot = torch.randperm(count, generator=generator)[kept // block], kept % block
    expected = in_one(pool, paged, targets, page, slot)
    before = torch.get_num_threads()
    constants = {"_TOGETHER_BYTES": together * pool.shape[1] * 2, "_STREAMED_BYTES": 0 if streamed else 2**60}
    with native.using_isa(name), patch.multiple(gather, **constants):
        try:
            torch.set_num_threads(threads)
            DealtPages(paged).move(pool, page, slot, targets, True)
        finally:
            torch.set_num_threads(before)
    assert same(pool, expected)


@pytest.mark.skipif(not ISAS, reason="no native library")
@pytest.mark.parametrize(("closed", "saved"), [(False, 0), (True, 1)])
def test_only_what_no_order_avoids_is_set_aside(closed, saved, monkeypatch):
    """Each page becomes the next one's neighbour; the last one the first's if the chain is closed."""
    paged, count = make_layout("keys_transposed", 16, 8), 40
    pool = torch.randn(count, 256).to(torch.bfloat16)
    targets = torch.arange(count if closed else count - 1)
    page, slot = ((targets + 1) % count).repeat_interleave(16), torch.arange(16).repeat(len(targets))
    expected = in_one(pool, paged, targets, page, slot)
    monkeypatch.setattr(gather, "_TOGETHER_BYTES", 1)
    memory = kept_pages(pool, 1 + len(targets)).fill_(7.0)
    DealtPages(paged).move(pool, page.flip(0).clone(), slot, targets.flip(0), True)
    assert same(pool, expected)
    assert int((memory[1:] != 7.0).any(1).sum()) == saved


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_go_where_they_are_told(layout):
    case = make_dealt_tokens(layout, 3, 8, 16, 3, 0, torch.float32, seed=1)
    mover, (page, slot) = DealtPages(case.layout), places(case)
    out = (torch.full((len(page), 8), 3.0), torch.full((len(page), 8), 3.0))
    told = mover.gather(case.pool, page, slot, out)
    assert [part.data_ptr() for part in told] == [part.data_ptr() for part in out]
    for part, fresh in zip(out, mover.gather(case.pool, page, slot), strict=True):
        assert same(part, fresh)
    for wrong in (out[0][:-1], out[0].double(), out[0].t().contiguous().t()):
        with pytest.raises(ValueError, match="values to write to must be contiguous"):
            mover.gather(case.pool, page, slot, (out[0], wrong))


@pytest.mark.parametrize("layout", ["slot_major", "keys_transposed"])
def test_bytes_move_too(layout):
    case = make_dealt_tokens(layout, 3, 8, 16, 3, 0, torch.float32, seed=1)
    pool = torch.randint(0, 256, case.pool.shape, dtype=torch.uint8)
    targets = case.targets(case.spare)
    expected = move_dealt(pool, case.layout, case.pages, targets, case.kept)
    DealtPages(case.layout).move(pool, *places(case), torch.tensor(case.spare), False)
    assert torch.equal(pool, expected)


def test_affine_layouts_are_served_natively_and_others_are_not(monkeypatch):
    done = []

    def counted(*args):
        done.append(gather_pages(*args))
        return done[-1]

    monkeypatch.setattr(dealt_pages, "gather_pages", counted)
    for layout, natively in (("slot_major", [True]), ("keys_transposed", [True]), ("tiled", [])):
        case = make_dealt_tokens(layout, 2, 8, 16, 2, 0, torch.bfloat16, seed=1)
        done.clear()
        DealtPages(case.layout).move(case.pool, *places(case), torch.tensor(case.spare), False)
        assert done == natively, layout


def test_without_the_library_torch_does_it(monkeypatch):
    case = make_dealt_tokens("keys_transposed", 3, 64, 16, 3, 0, torch.bfloat16, seed=1)
    expected = move_dealt(case.pool, case.layout, case.pages, case.targets(case.spare), case.kept)
    monkeypatch.setattr(native, "library", lambda: None)
    DealtPages(case.layout).move(case.pool, *places(case), torch.tensor(case.spare), False)
    assert same(case.pool, expected)


def test_a_token_from_the_wrong_slot_is_seen():
    """The control of the comparison above."""
    case = make_dealt_tokens("keys_transposed", 3, 64, 16, 3, 0, torch.bfloat16, seed=1)
    expected = move_dealt(case.pool, case.layout, case.pages, case.targets(case.spare), case.kept)
    page, slot = places(case)
    slot[5] = (slot[5] + 1) % 16
    DealtPages(case.layout).move(case.pool, page, slot, torch.tensor(case.spare), False)
    assert not same(case.pool, expected)


LAYOUT = make_layout("keys_transposed", 16, 8)
POOL = torch.zeros(5, 256)
ONE = torch.zeros(16, dtype=torch.int64)
TARGET = torch.tensor([1])


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda s: gather_tokens(POOL, s, ONE + 5, ONE), "page must be between 0 and 4, got 5"),
            (lambda s: gather_tokens(POOL, s, ONE - 1, ONE), "page .* got -1"),
            (lambda s: gather_tokens(POOL, s, ONE, ONE + 16), "slot must be between 0 and 15, got 16"),
            (lambda s: gather_tokens(POOL, s, ONE, ONE[:3]), "page must be int32 or int64"),
            (lambda s: gather_tokens(POOL, s, ONE, ONE, (POOL[:, :8], ONE)), "keys to write to must be contiguous"),
            (lambda s: gather_pages(POOL, s, ONE, ONE, TARGET + 4, False), "targets must be between 0 and 4"),
            (lambda s: gather_pages(POOL, s, ONE + 5, ONE, TARGET, True), "page must be between 0 and 4"),
            (lambda s: gather_pages(POOL, s, ONE[:8], ONE[:8], TARGET, False), "1 pages take 16 tokens"),
            (lambda s: gather_pages(POOL, s, ONE.float(), ONE, TARGET, False), "page must be int32 or int64"),
            (lambda s: PoolStrides.of(POOL[:, :128], LAYOUT), "the pool must be"),
        ],
    )
    def test_mistakes(self, call, says):
        strides = PoolStrides.of(POOL, LAYOUT)
        assert strides is not None
        with pytest.raises(ValueError, match=says):
            call(strides)
        assert not POOL.any()
