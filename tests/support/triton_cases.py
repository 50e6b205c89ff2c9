# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Every Triton kernel, run by Triton's interpreter, against the slow definitions.

`python triton_cases.py OPERATION` prints one JSON object a line: `error`, in units of what is allowed, and `control`,
the same of a result that should be wrong. See tests/unit/triton/test_interpreted.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import triton_interpreter  # noqa: F401 - first: it makes Triton interpret

# isort: split
import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.inputs import between_codes, make_dealt_tokens
from deltamem_vllm.ops.inputs_attention import AttentionCase, make_attention
from deltamem_vllm.ops.reference import move_dealt, read_pooled_token
from deltamem_vllm.ops.reference_attention import attend_pages
from deltamem_vllm.scoring import reference
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.triton_kernels.attention import paged_attention
from deltamem_vllm.triton_kernels.cold_pages import decode_delta, encode_delta
from deltamem_vllm.triton_kernels.gather import gather_pages
from deltamem_vllm.triton_kernels.utility import page_utility

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The output is rounded once and so is every probability, by half a unit in the last place: of the output, and of the
# largest value (under 5 here). float32: sums of a few hundred terms in another order.
UNIT = {BF16: 2.0**-9, FP16: 2.0**-12, FP32: 2.0**-20}
LARGEST_VALUE = 5.0
# Sums of products in float32, of scores up to about 50.
LSE_BOUND = 1e-4

# layout, dtype, D, block, G, bits, splits
ATTENTION = [
    ("slot_major", BF16, 64, 32, 3, 4, 1),
    ("slot_major", BF16, 64, 32, 3, 2, 3),
    ("slot_major", BF16, 128, 16, 4, 8, 3),
    ("slot_major", BF16, 80, 16, 1, 0, 1),
    ("keys_transposed", BF16, 96, 64, 16, 4, 1),
    ("slot_major", BF16, 256, 16, 8, 2, 1),
    ("slot_major", FP16, 64, 128, 8, 8, 1),
    ("slot_major", FP16, 80, 32, 4, 4, 3),
    ("slot_major", FP16, 128, 16, 16, 2, 1),
    ("keys_transposed", FP16, 64, 32, 1, 4, 2),
    ("slot_major", FP16, 96, 32, 4, 0, 2),
    ("slot_major", FP32, 64, 16, 1, 2, 2),
    ("slot_major", FP32, 80, 32, 3, 8, 1),
    ("slot_major", FP32, 256, 16, 4, 4, 2),
    ("keys_transposed", FP32, 128, 16, 20, 0, 1),
]


def attention() -> Iterator[dict[str, Any]]:
    for layout, dtype, dim, block, group, bits, splits in ATTENTION:
        # Decoding beside padding, chunks, a chunk that is all there is, a row that reads nothing, one cold pages only.
        queries, hot, cold = [1, 0, 5, 2, 1, 1], [block + 7, 9, block + 8, 2, 0, 1], [2, 1, 0, 1, 0, 1]
        case = make_attention(layout, dtype, dim, block, group, queries, hot, bits, cold, seed=dim + bits)
        output, lse = attend(case, splits)
        # Free rows belong to nobody, so they must be as they were.
        right = deviation(case, output, lse)
        case.block_table[0, 0] = case.block_table[2, 0]
        yield {
            "case": f"{layout} {dtype} D {dim} block {block} G {group} bits {bits} splits {splits}",
            "error": right,
            "control": deviation(case, output, lse),
        }


def attend(case: AttentionCase, splits: int | None) -> tuple[Tensor, Tensor]:
    output, lse = torch.full_like(case.query, 7.0), torch.full(case.query.shape[:2], 7.0)
    paged_attention(
        case.query,
        case.pool,
        case.hot,
        case.block_table,
        case.seq_lens,
        case.query_start_loc,
        case.scale,
        output,
        **case.cold,
        max_query_len=int(case.query_start_loc.diff().max()),
        lse=lse,
        splits=splits,
    )
    return output, lse


def deviation(case: AttentionCase, output: Tensor, lse: Tensor) -> float:
    """Largest difference from the definition, in units of what is allowed."""
    right, right_lse = attend_pages(
        case.query,
        case.pool,
        case.hot,
        case.block_table,
        case.seq_lens,
        case.query_start_loc,
        case.scale,
        **case.cold,
    )
    allowed = UNIT[case.pool.dtype] * (right.abs() + LARGEST_VALUE)
    nothing = right_lse == -torch.inf
    assert torch.equal(nothing, lse == -torch.inf) and not output[nothing].any(), "a row that reads nothing is not 0"
    apart = (lse.double() - right_lse)[~nothing].abs() / LSE_BOUND
    return max(float(((output.double() - right).abs() / allowed).max()), float(apart.max()))


def rows_of_nobody() -> Iterator[dict[str, Any]]:
    """Rows before, between and after the sequences stay as they are, with one split and with several."""
    for splits in (1, 2):
        case = make_attention("slot_major", FP32, 64, 16, 2, [1, 2], [20, 9], seed=1)
        case.query_start_loc[:] = torch.tensor([1, 1, 2])
        output, lse = attend(case, splits)
        touched = (output[[0, 2]] != 7.0).any() or (lse[[0, 2]] != 7.0).any()
        yield {"case": f"splits {splits}", "error": float(touched) * 2, "control": float((output[1] != 7.0).any()) * 2}


def codec() -> Iterator[dict[str, Any]]:
    """Bytes and decoded numbers: the very same, so a difference of one counts as two times what is allowed."""
    generator = torch.Generator().manual_seed(0)
    for dtype, dim, block in ((BF16, 64, 32), (FP16, 128, 16), (FP32, 80, 16), (BF16, 96, 64), (FP32, 256, 16)):
        for bits in (8, 4, 2):
            cold = ColdFormat(bits, dim, block * 2 * dim * dtype.itemsize)
            size = cold.capacity
            counts = torch.tensor([size, 1, size // 2, size - 1], dtype=torch.int32)
            factor = torch.randn(4, 1, dim, generator=generator).exp()
            keys = torch.randn(4, size, dim, generator=generator) * factor
            keys[..., 0] = between_codes(4, size, bits, generator)
            keys = keys.to(dtype)
            values = torch.randn(4, size, dim, generator=generator).to(dtype)
            keys[2, :, 3], keys[0, :, 5], values[0, 1] = 1.0, 0.0, -2.5  # ranges of nothing
            keys[0, 2, 7], values[3, 0, 1], values[3, 1, 2] = 3e38, float("inf"), -float("inf")
            keys[3, 1, 0] = float("nan")
            raw = torch.full((7, cold.page_bytes), 7, dtype=torch.uint8)
            encode_delta(cold, keys, values, counts, raw, torch.tensor([3, 5, 1, 6]))
            expected = torch.full_like(raw, 7)
            expected[[3, 5, 1, 6]] = encode_pages(cold, keys, values, counts.long())
            ids = torch.tensor([5, 6, 6, 3, 1], dtype=torch.int32)
            read = decode_delta(cold, expected, ids, dtype)
            right = decode_pages(cold, expected[ids.long()])
            same = all(torch.equal(a, b.to(a.dtype)) for a, b in zip(read, right, strict=True))
            broken = expected.clone()
            broken[3, cold.value_codes] ^= 1
            wrong = decode_delta(cold, broken, ids, dtype)
            yield {
                "case": f"{dtype} D {dim} block {block} bits {bits}",
                "error": 2.0 * float((raw != expected).sum() + (not same)),
                "control": 2.0 * float(not torch.equal(wrong[1], read[1])),
            }


def gather() -> Iterator[dict[str, Any]]:
    for layout, dtype, dim, block, in_place in (
        ("slot_major", BF16, 64, 32, True),
        ("keys_transposed", FP32, 80, 16, True),
        ("slot_major", FP16, 256, 16, False),
    ):
        case = make_dealt_tokens(layout, 4, dim, block, 3, 5, dtype, seed=dim)
        pages = [page for own in reversed(case.pages) for page in own] if in_place else case.spare
        targets = case.targets(pages)
        expected = move_dealt(case.pool, case.layout, case.pages, targets, case.kept)
        ids = [torch.tensor(own) for own in case.pages]
        page = torch.cat([own[kept // block] for own, kept in zip(ids, case.kept, strict=True)]).int()
        slot = torch.cat([kept % block for kept in case.kept])
        # Between pages of a larger allocation, which must stay as they are.
        whole = torch.full((len(case.pool), 2 * case.pool.shape[1]), 5.0, dtype=dtype)
        pool = whole[:, case.pool.shape[1] :]
        pool.copy_(case.pool)
        before = pool.clone()
        gather_pages(pool, case.layout, page, slot, torch.tensor([page for own in targets for page in own]))
        same = bits_of(pool).equal(bits_of(expected)) and bool((whole[:, : case.pool.shape[1]] == 5.0).all())
        yield {
            "case": f"{layout} {dtype} D {dim} block {block} in place {in_place}",
            "error": 2.0 * (not same),
            "control": 2.0 * float(not bits_of(before).equal(bits_of(expected))),
        }


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def utility() -> Iterator[dict[str, Any]]:
    """float32 sums in another order; where one entry has nearly all weight, of nearly equal numbers."""
    for layout, dtype, dim, block, group, window, hot, peaked, splits in (
        ("slot_major", BF16, 64, 32, 3, 4, (70, 33, 4), 1.0, 1),
        ("slot_major", FP16, 128, 16, 1, 2, (20, 9), 1.0, 2),
        ("keys_transposed", BF16, 80, 16, 1, 5, (40, 9), 8.0, 3),
        ("slot_major", FP32, 96, 48, 4, 3, (50, 3), 30.0, 2),
        ("slot_major", FP32, 256, 16, 8, 1, (17, 1), 1.0, 1),
    ):
        case = make_attention(layout, dtype, dim, block, group, [window] * len(hot), hot, seed=dim)
        generator = torch.Generator().manual_seed(dim)
        queries = (torch.randn(len(hot), group, window, dim, generator=generator) * peaked).to(dtype)
        scores, sums = page_utility(
            queries, case.pool, case.hot, case.block_table, case.seq_lens, case.scale, splits=splits
        )
        error = control = 0.0
        for s, count in enumerate(hot):
            where = [(int(case.block_table[s, j // block]), j % block) for j in range(count)]
            tokens = [read_pooled_token(case.pool, case.hot, *place) for place in where]
            keys, values = (torch.stack([token[part] for token in tokens]).unsqueeze(0) for part in (0, 1))
            right = torch.zeros(scores.shape[1], dtype=torch.float64)
            right[:count] = reference.delta(ScoreView(keys, values, queries[s], case.scale))[0]
            allowed = 1e-4 * right + 1e-5
            by_page = right.view(-1, block).sum(1)
            error = max(error, float(((scores[s].double() - right).abs() / allowed).max()))
            error = max(error, float(((sums[s].double() - by_page).abs() / (1e-4 * by_page + 1e-4)).max()))
            control = max(control, float(((scores[s].roll(1).double() - right).abs() / allowed).max()))
        yield {
            "case": f"{layout} {dtype} D {dim} block {block} G {group} splits {splits} x{peaked}",
            "error": error,
            "control": control,
        }


CASES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "attention": attention,
    "rows_of_nobody": rows_of_nobody,
    "codec": codec,
    "gather": gather,
    "utility": utility,
}

if __name__ == "__main__":
    for row in CASES[sys.argv[1]]():
        print(json.dumps(row), flush=True)
