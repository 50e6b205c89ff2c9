# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Every operation on a GPU against its definition in float64, on random inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.inputs import between_codes, make_dealt_tokens
from deltamem_vllm.ops.inputs_attention import AttentionCase, draw_attention, make_attention
from deltamem_vllm.ops.reference import move_dealt, read_pooled_token
from deltamem_vllm.ops.reference_attention import attend_pages
from deltamem_vllm.scoring import reference
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.triton_kernels.attention import paged_attention
from deltamem_vllm.triton_kernels.cold_pages import decode_delta, encode_delta
from deltamem_vllm.triton_kernels.gather import gather_pages
from deltamem_vllm.triton_kernels.utility import page_utility

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS, BLOCKS, GROUPS, BITS = (64, 80, 96, 128, 256), (16, 32, 64, 128), (1, 3, 4, 8, 16), (0, 8, 4, 2)

# Output and probabilities are rounded once each, by half a unit in the last place: of the output, and of the largest
# value (under 5 here). float32 is multiplied as three TF32 products, which lose about two of its last bits.
_UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-18}
_LARGEST_VALUE = 5.0
_LSE_BOUND = 1e-3  # of scores up to about 100, by float32 sums and GPU exponentials


@dataclass(frozen=True)
class Agreement:
    """How far one call was from its definition.

    Attributes
    ----------
    operation, case: which call.
    deviation: largest error in units of what is allowed; at most 1 is right.
    """

    operation: str
    case: str
    deviation: float


def check_all(device: torch.device) -> Iterator[Agreement]:
    """Check every operation; the settings of neighbouring cases differ in everything."""
    for number in range(60):
        yield attention(number, device)
    for number in range(15):
        yield codec(number, device)
    for number in range(12):
        yield gather(number, device)
    for number in range(10):
        yield utility(number, device)


def attention(number: int, device: torch.device) -> Agreement:
    """One random step of decoding, padding and prefill chunks, with the default number of splits."""
    dtype, dim, block, group = DTYPES[number % 3], DIMS[number % 5], BLOCKS[number % 4], GROUPS[number // 3 % 5]
    bits = BITS[number // 4 % 4]
    layout = "keys_transposed" if number % 7 == 6 else "slot_major"
    case = draw_attention(layout, dtype, dim, block, group, bits, seed=number)
    there = on_device(case, device)
    output = torch.zeros_like(there.query)
    lse = torch.full(there.query.shape[:2], -torch.inf, device=device)
    longest = int(case.query_start_loc.diff().max())
    paged_attention(
        there.query,
        there.pool,
        there.hot,
        there.block_table,
        there.seq_lens,
        there.query_start_loc,
        there.scale,
        output,
        **there.cold,
        max_query_len=longest,
        lse=lse,
    )
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
    allowed = _UNIT[dtype] * (right.abs() + _LARGEST_VALUE)
    deviation = _largest((output.cpu().double() - right).abs() / allowed)
    some = right_lse > -torch.inf
    deviation = max(deviation, _largest((lse.cpu().double() - right_lse)[some].abs() / _LSE_BOUND))
    name = f"{layout} {dtype} D {dim} block {block} G {group} bits {bits} queries up to {longest}"
    return Agreement("paged_attention", name, deviation)


def codec(number: int, device: torch.device) -> Agreement:
    """Bytes of cold pages, and what they decode to: bit by bit, so that one difference counts as far too much."""
    dtype, dim, block, bits = DTYPES[number % 3], DIMS[number % 5], BLOCKS[number % 4], (8, 4, 2)[number // 5]
    generator = torch.Generator().manual_seed(number)
    cold = ColdFormat(bits, dim, block * 2 * dim * dtype.itemsize)
    counts = torch.randint(1, cold.capacity + 1, (9,), generator=generator)
    keys = torch.randn(9, cold.capacity, dim, generator=generator)
    values = keys.flip(0).to(dtype)
    keys = keys * torch.randn(dim, generator=generator).exp()
    keys[..., 0] = between_codes(9, cold.capacity, bits, generator)
    keys = keys.to(dtype)
    raw = torch.zeros(12, cold.page_bytes, dtype=torch.uint8, device=device)
    targets = torch.randperm(12, generator=generator)[:9]
    encode_delta(cold, keys.to(device), values.to(device), counts.to(device), raw, targets.to(device))
    expected = torch.zeros_like(raw, device="cpu")
    expected[targets] = encode_pages(cold, keys, values, counts)
    different = int((raw.cpu() != expected).sum())
    read = decode_delta(cold, expected.to(device), targets.to(device), torch.float32)
    for got, right in zip(read, decode_pages(cold, expected[targets]), strict=True):
        different += int((got.cpu() != right).sum())
    return Agreement("encode_delta, decode_delta", f"{dtype} D {dim} block {block} bits {bits}", 2.0 * different)


def gather(number: int, device: torch.device) -> Agreement:
    """A compaction within the pool, bit by bit."""
    dtype, dim, block = DTYPES[number % 3], DIMS[number % 5], BLOCKS[number % 4]
    case = make_dealt_tokens("slot_major" if number % 2 else "keys_transposed", 6, dim, block, 4, 5, dtype, number)
    targets = case.targets([page for own in reversed(case.pages) for page in own])
    right = move_dealt(case.pool, case.layout, case.pages, targets, case.kept)
    ids = [torch.tensor(own) for own in case.pages]
    page = torch.cat([own[kept // block] for own, kept in zip(ids, case.kept, strict=True)])
    slot = torch.cat([kept % block for kept in case.kept])
    pool = case.pool.to(device)
    filled = torch.tensor([number for own in targets for number in own])
    gather_pages(pool, case.layout, page.to(device), slot.to(device), filled.to(device))
    different = int((pool.cpu().view(torch.uint8) != right.view(torch.uint8)).sum())
    return Agreement("gather_pages", f"{dtype} D {dim} block {block}", 2.0 * different)


def utility(number: int, device: torch.device) -> Agreement:
    """Scores of entries against removing each of them."""
    dtype, dim, block, group = DTYPES[number % 3], DIMS[number % 5], BLOCKS[number % 2], GROUPS[number % 4]
    window, hot, peaked = 3, (50 + number, 3, 17), (1.0, 8.0)[number % 2]
    case = draw_hot(dtype, dim, block, group, window, hot, number)
    generator = torch.Generator().manual_seed(number)
    queries = (torch.randn(len(hot), group, window, dim, generator=generator) * peaked).to(dtype)
    there = on_device(case, device)
    scores, _ = page_utility(queries.to(device), there.pool, there.hot, there.block_table, there.seq_lens, there.scale)
    deviation = 0.0
    for s, count in enumerate(hot):
        places = [(int(case.block_table[s, j // block]), j % block) for j in range(count)]
        tokens = [read_pooled_token(case.pool, case.hot, *place) for place in places]
        keys, values = (torch.stack([token[part] for token in tokens]).unsqueeze(0) for part in (0, 1))
        right = reference.delta(ScoreView(keys, values, queries[s], case.scale))[0]
        apart = (scores[s, :count].cpu().double() - right).abs()
        deviation = max(deviation, _largest(apart / (1e-3 * right + 1e-4)))
    return Agreement("page_utility", f"{dtype} D {dim} block {block} G {group} x{peaked:g}", deviation)


def draw_hot(
    dtype: torch.dtype, dim: int, block: int, group: int, window: int, hot: tuple[int, ...], seed: int
) -> AttentionCase:
    """Sequences of hot pages alone."""
    return make_attention("slot_major", dtype, dim, block, group, [window] * len(hot), hot, seed=seed)


def on_device(case: AttentionCase, device: torch.device) -> AttentionCase:
    """The same case with its tensors on a device."""
    table, counts = case.cold_table, case.cold_pages
    return replace(
        case,
        query=case.query.to(device),
        pool=case.pool.to(device),
        block_table=case.block_table.to(device),
        seq_lens=case.seq_lens.to(device),
        query_start_loc=case.query_start_loc.to(device),
        cold_table=None if table is None else table.to(device),
        cold_pages=None if counts is None else counts.to(device),
    )


def _largest(values: Tensor) -> float:
    """The largest of some numbers, 0 of none; NaN counts as infinite."""
    return float(values.nan_to_num(nan=torch.inf).max()) if values.numel() else 0.0
