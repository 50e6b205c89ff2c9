# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention over hot and cold pages on CPU: every instruction set of this machine against the float64 definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltamem_vllm.ops import native
from deltamem_vllm.ops.inputs_attention import NOT_A_PAGE, AttentionCase, draw_attention, make_attention
from deltamem_vllm.ops.paged_attention import paged_attention
from deltamem_vllm.ops.reference_attention import attend_pages
from tests.support.examples import examples

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("keys_transposed", "slot_major")

# Sums of up to 256 products and 2,000 weights in float32.
# float16: the result's own rounding (2^-11 of it). With integers for 16-bit models' cold pages a score is wrong by up
# to 1e-3 more: 2^-16 of the largest factor, times 3 to 255, summed over the dims.
# bfloat16: the result's rounding (2^-9) and that of each weight (2^-9), times values of up to 4.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 3e-5},
    torch.float16: {"rtol": 1e-3, "atol": 3e-3},
    torch.bfloat16: {"rtol": 6e-3, "atol": 1e-2},
}
LSE_TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 5e-3}

needs_native = pytest.mark.skipif(not native.available(), reason="deltamem's native library is not built")


def attend(case: AttentionCase, isa: str | None = None, threads: int = 1) -> tuple[Tensor, Tensor]:
    output = torch.full_like(case.query, 77.0)
    lse = torch.full(case.query.shape[:2], 77.0)
    paged_attention(
        case.query, case.pool, case.hot, case.block_table, case.seq_lens, case.query_start_loc, case.scale, output,
        **case.cold, lse=lse, isa=isa, threads=threads,
    )  # fmt: skip
    return output, lse


def define(case: AttentionCase) -> tuple[Tensor, Tensor]:
    return attend_pages(
        case.query, case.pool, case.hot, case.block_table, case.seq_lens, case.query_start_loc, case.scale, **case.cold
    )


def close(case: AttentionCase, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    dtype = case.query.dtype
    return torch.allclose(found[0].double(), expected[0], **TOLERANCE[dtype]) and torch.allclose(
        found[1].double(), expected[1], rtol=0, atol=LSE_TOLERANCE[dtype]
    )


def check(case: AttentionCase, threads: int = 1) -> None:
    expected = define(case)
    for isa in native.supported_isas():
        found = attend(case, isa, threads)
        assert close(case, found, expected), (
            f"{isa}: output wrong by {(found[0].double() - expected[0]).abs().max()}, "
            f"log-sum-exp by {(found[1].double() - expected[1]).nan_to_num(0).abs().max()}"
        )


@needs_native
@pytest.mark.parametrize("bits", [0, 8, 4, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_head_size_equals_the_definition(dim, dtype, bits):
    check(draw_attention("keys_transposed", dtype, dim, 32, 3, bits, seed=dim + bits))


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_size_and_layout_equals_the_definition(dtype, block_size, layout):
    check(draw_attention(layout, dtype, 64, block_size, 4, 4, seed=block_size))


@needs_native
@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size_equals_the_definition(group):
    for dtype in (torch.bfloat16, torch.float32):
        check(draw_attention("keys_transposed", dtype, 64, 32, group, (0, 8, 4, 2)[group % 4], seed=group))


@needs_native
@settings(max_examples=examples(25), deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    dim=st.integers(1, 16).map(lambda n: 16 * n),
    block_size=st.integers(1, 8).map(lambda n: 16 * n),
    group=st.integers(1, 32),
    bits=st.sampled_from([0, 8, 4, 2]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**16),
)
def test_any_step_equals_the_definition(layout, dtype, dim, block_size, group, bits, threads, seed):
    check(draw_attention(layout, dtype, dim, block_size, group, bits, seed), threads)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_are_split_over_threads(dtype):
    case = make_attention("keys_transposed", dtype, 64, 32, 3, [1, 40], [3000, 700], 4, [5, 0], seed=3)
    expected = define(case)
    for isa in native.supported_isas():
        for threads in (2, 3, 8):
            first, second = attend(case, isa, threads), attend(case, isa, threads)
            assert close(case, first, expected)
            assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    if dtype == torch.float32:  # the others round the difference away
        # Not the same bits as on one thread: parts were merged, so the test has seen a split.
        assert not torch.equal(attend(case, threads=1)[0], attend(case, threads=8)[0])


@needs_native
@pytest.mark.parametrize("bits", [0, 4])
def test_one_wrong_page_is_seen(bits):
    """The control of all tests above: what they compare is not too coarse to see one page of many."""
    case = make_attention("keys_transposed", torch.bfloat16, 64, 32, 3, [1, 1, 9], [200, 100, 150], bits, [2, 1, 0])
    expected = define(case)
    for isa in native.supported_isas():
        assert close(case, attend(case, isa), expected)
        table = case.block_table.clone()
        table[0, 2] = table[1, 1]
        assert not close(case, attend(replace(case, block_table=table), isa), expected)
        if case.cold_table is not None:
            table = case.cold_table.clone()
            table[0, 1] = table[1, 0]
            assert not close(case, attend(replace(case, cold_table=table), isa), expected)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_sees_nothing_after_itself(dtype):
    case = make_attention("keys_transposed", dtype, 64, 32, 2, [50], [170], 2, [1], seed=5)
    page, slot = int(case.block_table[0, 165 // 32]), 165 % 32
    pool = case.pool.clone()
    pool[page, case.hot.keys[slot]] += 3
    pool[page, case.hot.values[slot]] = 9
    for isa in native.supported_isas():
        before, after = attend(case, isa)[0], attend(case.with_pool(pool), isa)[0]
        changed = (before != after).flatten(1).any(1)
        assert not changed[:45].any() and changed[45:].all()  # token 165 is query 45's own


@needs_native
def test_a_sequence_without_tokens_writes_zeros_and_other_rows_are_left_alone():
    case = make_attention("keys_transposed", torch.bfloat16, 64, 32, 3, [1, 0, 2], [40, 0, 60], 8, [1, 2, 0])
    empty = replace(case, seq_lens=torch.tensor([0, 0, 60], dtype=torch.int32))
    empty = replace(empty, cold_pages=torch.tensor([0, 2, 0], dtype=torch.int32))
    query = torch.cat([case.query, case.query[:1]])  # a row that belongs to no sequence
    for isa in native.supported_isas():
        output, lse = attend(replace(empty, query=query), isa)
        assert not output[0].any() and torch.isneginf(lse[0]).all()
        assert output[1:3].any() and (output[3] == 77.0).all() and (lse[3] == 77.0).all()


@needs_native
def test_parts_merge_by_their_log_sum_exp():
    case = make_attention("keys_transposed", torch.float32, 64, 32, 3, [1, 1], [100, 30], 4, [2, 1], seed=8)
    whole, whole_lse = attend(case)
    hot, hot_lse = attend(replace(case, cold_pages=torch.zeros(2, dtype=torch.int32)))
    cold, cold_lse = attend(replace(case, seq_lens=torch.zeros(2, dtype=torch.int32)))
    torch.testing.assert_close(torch.logaddexp(hot_lse, cold_lse), whole_lse, rtol=0, atol=3e-5)
    merged = hot * (hot_lse - whole_lse).exp().unsqueeze(2) + cold * (cold_lse - whole_lse).exp().unsqueeze(2)
    torch.testing.assert_close(merged, whole, **TOLERANCE[torch.float32])


@needs_native
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_count_above_the_capacity_reads_a_full_page(bits):
    case = make_attention("keys_transposed", torch.float16, 64, 32, 3, [1], [20], bits, [2], full=True)
    assert case.cold_table is not None
    for isa in native.supported_isas():
        expected = attend(case, isa)
        for count in (10**6, 2**31 - 1):
            pool = case.pool.clone()
            header = pool.view(torch.uint8)[int(case.cold_table[0, 1]), :4].view(torch.int32)
            header.fill_(count)
            assert torch.equal(attend(case.with_pool(pool), isa)[0], expected[0])
        header.fill_(-5)
        assert not torch.equal(attend(case.with_pool(pool), isa)[0], expected[0])
        assert attend(case.with_pool(pool), isa)[0].isfinite().all()


@needs_native
def test_nan_is_not_hidden():
    case = make_attention("keys_transposed", torch.bfloat16, 64, 32, 3, [1], [1])
    pool = torch.full_like(case.pool, float("nan"))
    for isa in native.supported_isas():
        assert attend(case.with_pool(pool), isa)[0].isnan().all()


@needs_native
@settings(max_examples=examples(25), deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_wrong_tables_are_refused_and_garbage_pages_do_no_harm(data, seed):
    case = make_attention("keys_transposed", torch.float16, 32, 16, 2, [1, 3], [40, 50], 4, [2, 1], seed=seed)
    pool = torch.randint(0, 256, (len(case.pool), 2 * case.pool.shape[1]), dtype=torch.uint8).view(torch.float16)
    attend(case.with_pool(pool))  # headers, scales and elements of any bits
    assert case.cold_table is not None and case.cold_pages is not None
    wrong = data.draw(st.sampled_from([-1, -(2**31), len(pool), NOT_A_PAGE, 2**31 - 1]))
    field, place = data.draw(
        st.sampled_from(
            [("block_table", (0, 2)), ("block_table", (1, 0)), ("cold_table", (0, 1)), ("cold_table", (1, 0))]
        )
    )
    table = getattr(case, field).clone()
    table[place] = wrong
    with pytest.raises(ValueError, match=r"sequence \d has a (hot|cold) page outside the pool"):
        attend(replace(case, **{field: table}))
    field = data.draw(st.sampled_from(["seq_lens", "cold_pages", "query_start_loc"]))
    table = getattr(case, field).clone()
    table[1] = data.draw(st.sampled_from([-1, -(2**31), 65, 2**31 - 1]))
    with pytest.raises(ValueError, match=r"sequence \d has a length"):
        attend(replace(case, **{field: table}))


@needs_native
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(1, 3, 48, dtype=torch.bfloat16)}, "query must be"),
        ({"query": torch.zeros(1, 40, 64, dtype=torch.bfloat16)}, "query must be"),
        ({"query": torch.zeros(1, 3, 64)}, "one dtype"),
        ({"pool": torch.zeros(9, 100, dtype=torch.bfloat16)}, "the pool must be"),
        ({"block_table": torch.zeros(1, 3, dtype=torch.int64)}, "block_table must be int32"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int32)}, "must be int32 with"),
        ({"cold_table": None}, "belong together"),
    ],
)
def test_wrong_shapes_are_refused(change, words):
    case = make_attention("keys_transposed", torch.bfloat16, 64, 32, 3, [1], [40], 4, [1])
    with pytest.raises(ValueError, match=words):
        attend(replace(case, **change))


@needs_native
def test_a_tiled_layout_is_refused():
    with pytest.raises(ValueError, match="fixed distances"):
        attend(make_attention("tiled", torch.bfloat16, 64, 32, 3, [1], [40]))


@pytest.mark.parametrize("bits", [0, 4])
def test_without_the_library_the_result_is_the_same(monkeypatch, bits):
    monkeypatch.setattr("deltamem_vllm.ops.paged_attention.library", lambda: None)
    for seed in range(3):
        case = draw_attention("keys_transposed", torch.float32, 64, 32, 3, bits, seed)
        assert close(case, attend(case), define(case))
    empty = make_attention("keys_transposed", torch.float32, 64, 32, 3, [1, 2], [0, 40])
    output, lse = attend(empty)
    assert not output[0].any() and torch.isneginf(lse[0]).all() and close(empty, (output, lse), define(empty))


@needs_native
def test_formats_and_pools_are_told_apart():
    """What is worked out once for a pool is not used for another."""
    pools = ((torch.float32, 16, 4), (torch.bfloat16, 32, 8), (torch.float32, 32, 0))
    for seed, (dtype, size, bits) in enumerate(pools):
        for layout in LAYOUTS:
            check(make_attention(layout, dtype, 64, size, 2, [1, 3], [40, 50], bits, [1, 2], seed=seed))
