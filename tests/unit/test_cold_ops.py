# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Cold pages: torch's, every native version and the definition, byte for byte."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.codec.cold_codec import encode_pages
from deltamem_vllm.codec.cold_page import BITS, ColdFormat
from deltamem_vllm.ops import gather, native, reference_cold
from deltamem_vllm.ops.cold import decode_delta, encode_delta, encode_from, in_words, read_tokens
from deltamem_vllm.ops.inputs import LAYOUTS, make_layout
from deltamem_vllm.ops.inputs_cold import KINDS, ColdTokens, make_cold_tokens, make_hostile_pages, put_in_pool
from tests.support.examples import examples

ISAS = native.supported_isas()
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=ISAS)
def isa(request):
    with native.using_isa(request.param):
        yield request.param


def encoded(case: ColdTokens) -> torch.Tensor:
    """The pages in a pool that was full of something else, in reverse order, with a page of it on either side."""
    pages = len(case.counts)
    raw = torch.full((pages + 2, case.cold.page_bytes), 0xAA, dtype=torch.uint8)
    encode_delta(case.cold, case.keys, case.values, case.counts, raw, torch.arange(pages, 0, -1))
    assert (raw[0] == 0xAA).all() and (raw[-1] == 0xAA).all()
    return raw[1:-1].flip(0)


def past_caches(streamed: bool):
    """Whatever the size: written past the caches, or never."""
    return patch.object(gather, "_STREAMED_BYTES", 0 if streamed else 2**60)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, but for what kind of NaN it is."""
    a, b = (torch.where(part.isnan(), torch.nan, part) for part in (a, b))
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_there_are_native_versions_to_compare() -> None:
    assert "scalar" in ISAS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_version_writes_the_same_bytes(kind, bits, dim):
    for dtype in DTYPES:
        case = make_cold_tokens(kind, bits, dim, 16, 5, dtype, seed=dim + bits)
        expected = encode_pages(case.cold, case.keys, case.values, case.counts)
        for name in ISAS:
            with native.using_isa(name):
                assert torch.equal(encoded(case), expected), (name, dtype)


@settings(max_examples=examples(150), deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from(BITS),
    dim=st.integers(1, 66).map(lambda n: 4 * n),
    block_size=st.integers(16, 128),
    pages=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(ISAS or ("none",)),
    streamed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(kind, bits, dim, block_size, pages, dtype, name, streamed, seed):
    case = make_cold_tokens(kind, bits, dim, block_size, pages, dtype, seed)
    with native.using_isa(name), past_caches(streamed):
        raw = encoded(case)
        assert torch.equal(raw, encode_pages(case.cold, case.keys, case.values, case.counts))
        keys, values, counts = decode_delta(case.cold, raw, torch.arange(pages), torch.float32)
    assert torch.equal(counts, case.counts)
    for part in (keys, values):
        assert part.shape == (pages, case.cold.capacity, dim) and part.isfinite().all()
        for page, count in enumerate(counts):
            assert not part[page, count:].any()


@settings(max_examples=examples(25), deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from(BITS),
    dim=st.sampled_from([4, 8, 20, 64]),
    dtype=st.sampled_from(DTYPES),
    streamed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_torch_writes_and_native_reads_what_the_definition_says(kind, bits, dim, dtype, streamed, seed):
    case = make_cold_tokens(kind, bits, dim, 16, 2, dtype, seed)
    raw = encode_pages(case.cold, case.keys, case.values, case.counts)
    for page, count in enumerate(case.counts.tolist()):
        expected = reference_cold.encode_page(case.cold, case.keys[page], case.values[page], count)
        assert bytes(raw[page].tolist()) == expected
        keys, values, held = reference_cold.decode_page(case.cold, expected)
        for name in ISAS:
            with native.using_isa(name), past_caches(streamed):
                for out in DTYPES:
                    got = decode_delta(case.cold, raw, torch.tensor([page]), out)
                    assert int(got[2]) == held == count
                    assert same(got[0][0], keys.to(out)) and same(got[1][0], values.to(out)), (name, out)


@settings(max_examples=examples(40), deadline=None)
@given(
    bits=st.sampled_from(BITS),
    dim=st.sampled_from([8, 20, 64, 80]),
    out=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_bytes_that_nobody_wrote_are_read_alike(bits, dim, out, seed):
    cold = ColdFormat(bits, dim, 16 * 2 * dim * 2)
    raw = make_hostile_pages(cold, 3, seed)
    for page in range(3):
        keys, values, held = reference_cold.decode_page(cold, bytes(raw[page].tolist()))
        for name in ISAS:
            with native.using_isa(name):
                got = decode_delta(cold, raw, torch.tensor([page]), out)
            assert int(got[2]) == held
            assert same(got[0][0], keys.to(out)) and same(got[1][0], values.to(out)), name


@settings(max_examples=examples(80), deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    bits=st.sampled_from(BITS),
    dim=st.sampled_from([8, 64, 80]),
    block_size=st.sampled_from([16, 32, 48]),
    pages=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(ISAS or ("none",)),
    in_place=st.booleans(),
    streamed=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_tokens_of_hot_pages_become_cold(layout, bits, dim, block_size, pages, dtype, name, in_place, streamed, seed):
    case = make_cold_tokens("normal", bits, dim, block_size, pages, dtype, seed)
    there = put_in_pool(case, layout, block_size, seed)
    targets = there.spare
    if in_place and pages:  # pages that tokens are taken from, of this cold page and of others
        own = torch.unique(there.pages[there.pages < len(there.pool)])
        targets = torch.cat([own.flip(0), there.spare])[:pages]
    before = there.pool.clone()
    with native.using_isa(name), past_caches(streamed):
        encode_from(there.pool, there.layout, case.cold, there.pages, there.slots, case.counts, targets)
    before.view(torch.uint8)[targets] = encode_pages(case.cold, case.keys, case.values, case.counts)
    assert torch.equal(before.view(torch.uint8), there.pool.view(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
def test_a_quotient_is_rounded_as_division_rounds_it(isa, bits):
    """Halfway between two codes of any step, and one float32 beside it: where a reciprocal would be seen."""
    cold = ColdFormat(bits, 256, 64 * 2 * 256 * 2)
    generator = torch.Generator().manual_seed(bits)
    most = 2**bits - 1
    steps = torch.rand(8, 1, 256, generator=generator).add_(1.0).half().float()
    x = (torch.randint(0, most, (8, cold.capacity, 256), generator=generator) + 0.5) * steps
    way = torch.randint(-1, 2, x.shape, generator=generator)
    x = torch.where(way == 0, x, torch.nextafter(x, way * torch.inf))
    x[:, 0], x[:, 1] = 0.0, most * steps[:, 0]
    counts = torch.full((8,), cold.capacity)
    for case in (ColdTokens(cold, x, x, counts), ColdTokens(cold, -x, x, counts)):
        assert torch.equal(encoded(case), encode_pages(cold, case.keys, case.values, counts))


def test_a_negative_zero_is_a_zero(isa):
    case = make_cold_tokens("normal", 4, 64, 16, 1, torch.float32, seed=0, full=True)
    for part in (case.keys, case.values):
        part.clamp_(min=0.0).mul_(torch.where(part == 0, -1.0, 1.0))
    assert torch.signbit(case.keys).any()
    raw = encoded(case)
    cold = case.cold
    zeros = torch.cat([raw[0, cold.key_zero : cold.value_scale], raw[0, cold.value_zero : cold.key_codes]])
    assert not torch.signbit(zeros.view(torch.float16)).any()
    assert torch.equal(raw, encode_pages(cold, case.keys + 0.0, case.values + 0.0, case.counts))


def test_the_comparison_sees_one_wrong_code(isa):
    case = make_cold_tokens("normal", 4, 64, 16, 2, torch.bfloat16, seed=1, full=True)
    raw = encoded(case)
    case.keys[1, 3, 7] += 4.0
    assert not torch.equal(raw, encode_pages(case.cold, case.keys, case.values, case.counts))


@pytest.mark.parametrize("streamed", [False, True])
def test_pages_inside_a_larger_allocation(isa, streamed):
    case = make_cold_tokens("outliers", 2, 96, 16, 3, torch.bfloat16, seed=2)
    whole = torch.full((3, case.cold.page_bytes + 6), 7, dtype=torch.uint8)
    view = whole[:, 3:-3]  # also at an odd address
    with past_caches(streamed):
        encode_delta(case.cold, case.keys, case.values, case.counts, view, torch.arange(3))
    assert torch.equal(view, encode_pages(case.cold, case.keys, case.values, case.counts))
    assert (whole[:, :3] == 7).all() and (whole[:, -3:] == 7).all()
    ids = torch.tensor([2, 0, 2])
    for got, expected in zip(
        decode_delta(case.cold, view, ids, torch.bfloat16),
        decode_delta(case.cold, view.contiguous()[ids], torch.arange(3), torch.bfloat16),
        strict=True,
    ):
        assert torch.equal(got, expected)


@settings(max_examples=examples(40), deadline=None)
@given(
    bits=st.sampled_from(BITS),
    dim=st.sampled_from([8, 20, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    streamed=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**16),
)
def test_tokens_are_read_one_behind_the_other(bits, dim, dtype, streamed, threads, seed):
    """Of full pages, partly filled ones, pages read twice, bytes that nobody wrote: what pages are read as alone."""
    case = make_cold_tokens("outliers", bits, dim, 16, 3, dtype, seed)
    raw = torch.cat([encoded(case), make_hostile_pages(case.cold, 4, seed)])
    ids = torch.randint(0, len(raw), (9,), generator=torch.Generator().manual_seed(seed))
    keys, values, counts = decode_delta(case.cold, raw, ids, dtype)
    there = torch.arange(case.cold.capacity) < counts.unsqueeze(1)
    before = torch.get_num_threads()
    for name in ISAS:
        with native.using_isa(name), past_caches(streamed):
            torch.set_num_threads(threads)
            got = read_tokens(case.cold, raw, ids, dtype)
            torch.set_num_threads(before)
        assert torch.equal(got[2], counts)
        assert same(got[0], keys[there]) and same(got[1], values[there]), name
    none = read_tokens(case.cold, raw, ids[:0], dtype)
    assert [tuple(part.shape) for part in none] == [(0, dim), (0, dim), (0,)]


def test_bytes_are_moved_eight_at_a_time_where_they_can_be():
    raw = torch.arange(64, dtype=torch.uint8).view(2, 32)
    words = in_words(raw)
    assert words.dtype == torch.int64 and words.shape == (2, 4)
    assert words.data_ptr() == raw.data_ptr()
    assert in_words(raw[:, :12]).dtype == torch.uint8  # no whole number of eights
    assert in_words(raw[:, 3:19]).dtype == torch.uint8  # from an odd address
    assert in_words(torch.zeros(68, dtype=torch.uint8).as_strided((2, 32), (36, 1))).dtype == torch.uint8


def test_without_the_library_the_result_is_the_same(monkeypatch):
    case = make_cold_tokens("outliers", 4, 64, 16, 3, torch.float16, seed=5)
    there, again = (put_in_pool(case, "keys_transposed", 16, 5) for _ in range(2))
    natively = encoded(case)
    read = decode_delta(case.cold, natively, torch.arange(3), torch.float16)
    in_a_row = [part.clone() for part in read_tokens(case.cold, natively, torch.arange(3), torch.float16)]
    encode_from(there.pool, there.layout, case.cold, there.pages, there.slots, case.counts, there.spare)
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(encoded(case), natively)
    for part, other in zip(decode_delta(case.cold, natively, torch.arange(3), torch.float16), read, strict=True):
        assert torch.equal(part, other)
    for part, other in zip(read_tokens(case.cold, natively, torch.arange(3), torch.float16), in_a_row, strict=True):
        assert torch.equal(part, other)
    encode_from(again.pool, again.layout, case.cold, again.pages, again.slots, case.counts, again.spare)
    assert torch.equal(there.pool.view(torch.uint8), again.pool.view(torch.uint8))
    hostile = make_hostile_pages(case.cold, 4, 0)
    assert decode_delta(case.cold, hostile, torch.arange(4), torch.float16)[2].max() <= case.cold.capacity


COLD = ColdFormat(4, 8, 16 * 2 * 8 * 2)
DENSE = torch.zeros(2, COLD.capacity, 8)
RAW = torch.zeros(5, COLD.page_bytes, dtype=torch.uint8)
ONE, TWO = torch.tensor([1, 1]), torch.tensor([0, 1])
POOL = torch.zeros(5, 256, dtype=torch.bfloat16)
PLACES = torch.zeros(2, COLD.capacity, dtype=torch.int64)
LAYOUT = make_layout("keys_transposed", 16, 8)


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "says"),
        [
            (lambda: encode_delta(COLD, DENSE, DENSE, ONE, RAW, torch.tensor([0, 5])), "targets must be between 0 and"),
            (lambda: encode_delta(COLD, DENSE, DENSE, ONE, RAW, torch.tensor([-1, 1])), "targets .* got -1"),
            (lambda: encode_delta(COLD, DENSE, DENSE, ONE - 1, RAW, TWO), "counts must be between 1"),
            (lambda: encode_delta(COLD, DENSE, DENSE, ONE * 999, RAW, TWO), "counts .* got 999"),
            (lambda: encode_delta(COLD, DENSE, DENSE, ONE.float(), RAW, TWO), "counts must be int32 or int64"),
            (lambda: encode_delta(COLD, DENSE[:, 1:], DENSE, ONE, RAW, TWO), "keys of 2 cold pages"),
            (lambda: encode_delta(COLD, DENSE, DENSE.half(), ONE, RAW, TWO), "values of 2 cold pages"),
            (lambda: encode_delta(COLD, DENSE.double(), DENSE.double(), ONE, RAW, TWO), "keys of 2 cold pages"),
            (lambda: encode_delta(COLD, DENSE, DENSE, ONE, RAW[:, 1:], TWO), "the pool as bytes"),
            (lambda: encode_delta(COLD, DENSE, DENSE, ONE, RAW.float(), TWO), "the pool as bytes"),
            (lambda: decode_delta(COLD, RAW, torch.tensor([5]), torch.float16), "ids must be between 0 and 4, got 5"),
            (lambda: decode_delta(COLD, RAW, torch.tensor([-1]), torch.float16), "ids .* got -1"),
            (lambda: decode_delta(COLD, RAW, torch.tensor(1), torch.float16), "ids must be int32 or int64"),
            (lambda: decode_delta(COLD, RAW, TWO, torch.float64), "not torch.float64"),
            (lambda: read_tokens(COLD, RAW, torch.tensor([5]), torch.float16), "ids must be between 0 and 4, got 5"),
            (lambda: read_tokens(COLD, RAW, TWO, torch.float64), "not torch.float64"),
            (lambda: read_tokens(COLD, RAW[:, 1:], TWO, torch.float16), "the pool as bytes"),
            (lambda: encode_from(POOL, LAYOUT, COLD, PLACES + 5, PLACES, ONE, TWO), "page must be between 0 and 4"),
            (lambda: encode_from(POOL, LAYOUT, COLD, PLACES, PLACES + 16, ONE, TWO), "slot must be between 0 and 15"),
            (lambda: encode_from(POOL, LAYOUT, COLD, PLACES - 1, PLACES, ONE, TWO), "page .* got -1"),
            (lambda: encode_from(POOL, LAYOUT, COLD, PLACES[:1], PLACES, ONE, TWO), "pages and slots must be"),
            (lambda: encode_from(POOL, LAYOUT, COLD, PLACES, PLACES, ONE, TWO + 4), "targets must be between 0 and 4"),
            (lambda: encode_from(POOL, LAYOUT, COLD, PLACES, PLACES, ONE * 0, TWO), "counts must be between 1"),
            (lambda: encode_from(POOL, LAYOUT, COLD, PLACES.float(), PLACES, ONE, TWO), "page must be int32 or int64"),
            (lambda: encode_from(POOL.int(), LAYOUT, COLD, PLACES, PLACES, ONE, TWO), "not of torch.int32"),
            (lambda: encode_from(POOL[:, :128], LAYOUT, COLD, PLACES, PLACES, ONE, TWO), "the pool must be"),
        ],
    )
    def test_mistakes(self, call, says):
        with pytest.raises(ValueError, match=says):
            call()
        assert not RAW.any() and not POOL.any()
