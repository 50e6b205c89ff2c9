# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How fast every operation is: against the bandwidth of a plain copy, and against what one would use instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.dealing.deal import deal
from deltamem_vllm.evaluation.gpu_check.baselines import dense_baselines
from deltamem_vllm.evaluation.gpu_check.exact import on_device
from deltamem_vllm.evaluation.gpu_check.timing import Clock
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs_attention import AttentionCase, make_attention
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.delta import DeltaScorer
from deltamem_vllm.triton_kernels.attention import paged_attention
from deltamem_vllm.triton_kernels.cold_pages import decode_delta, encode_delta
from deltamem_vllm.triton_kernels.gather import gather_pages
from deltamem_vllm.triton_kernels.utility import page_utility

# A model of 8B: D, query heads of a kv head, kv heads. Requests, tokens of their context.
_DIM, _GROUP, _HEADS, _REQUESTS, _CONTEXT = 128, 4, 8, 8, 8192
_BLOCK = 32


@dataclass(frozen=True)
class Timed:
    """One operation beside its alternatives, on the same work.

    Attributes
    ----------
    operation, case: what was done.
    useful_bytes: that have to be read and written once, at least; 0 where computing decides.
    seconds: medians by name; ours is "deltamem".
    """

    operation: str
    case: str
    useful_bytes: int
    seconds: dict[str, float]

    @property
    def gb_per_s(self) -> float:
        """10^9 useful bytes a second of ours."""
        return self.useful_bytes / self.seconds["deltamem"] / 1e9


def time_all(device: torch.device, clock: Clock) -> Iterator[Timed]:
    """Time every operation."""
    for dtype in (torch.bfloat16, torch.float16):
        for bits in (0, 8, 4, 2) if dtype == torch.bfloat16 else (0, 4):
            yield decoding(device, clock, dtype, bits)
    for bits in (0, 4):
        yield prefill(device, clock, bits)
    for bits in (8, 4, 2):
        yield from codec(device, clock, bits)
    yield gather(device, clock)
    yield utility(device, clock)
    yield dealing(device, clock)


def attending(case: AttentionCase, longest: int) -> Callable[[], None]:
    """A call of our kernel."""
    output = torch.zeros_like(case.query)
    return lambda: paged_attention(
        case.query,
        case.pool,
        case.hot,
        case.block_table,
        case.seq_lens,
        case.query_start_loc,
        case.scale,
        output,
        **case.cold,
        max_query_len=longest,
    )


def decoding(device: torch.device, clock: Clock, dtype: torch.dtype, bits: int) -> Timed:
    """One token of every request: all hot, or a sixteenth hot and the rest in cold pages."""
    sequences = _REQUESTS * _HEADS
    hot, cold = _CONTEXT, 0
    if bits:
        capacity = ColdFormat(bits, _DIM, _BLOCK * 2 * _DIM * dtype.itemsize).capacity
        hot = _CONTEXT // 16
        cold = (_CONTEXT - hot) // capacity
    case = on_device(
        make_attention(
            "slot_major", dtype, _DIM, _BLOCK, _GROUP, [1] * sequences, [hot] * sequences, bits,
            [cold] * sequences, full=True,
        ),
        device,
    )  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {"deltamem": attending(case, 1)}
    calls |= dense_baselines(device, dtype, _REQUESTS, _HEADS, _GROUP, _DIM, 1, _CONTEXT)
    where = f"{_CONTEXT} tokens hot" if not bits else f"{hot} tokens hot, {cold} cold pages of {bits} bits"
    name = f"decode {_name(dtype)}, {_REQUESTS} requests, {_HEADS} kv heads, G {_GROUP}, D {_DIM}, {where}"
    return Timed("paged_attention", name, case.bytes_read, clock.seconds(calls))


def prefill(device: torch.device, clock: Clock, bits: int) -> Timed:
    """A chunk of one request behind a context."""
    chunk, dtype = 1024, torch.bfloat16
    hot, cold = 4096 + chunk, 0
    if bits:
        capacity = ColdFormat(bits, _DIM, _BLOCK * 2 * _DIM * dtype.itemsize).capacity
        hot, cold = chunk, 4096 // capacity
    case = on_device(
        make_attention(
            "slot_major", dtype, _DIM, _BLOCK, _GROUP, [chunk] * _HEADS, [hot] * _HEADS, bits, [cold] * _HEADS,
            full=True,
        ),
        device,
    )  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {"deltamem": attending(case, chunk)}
    calls |= dense_baselines(device, dtype, 1, _HEADS, _GROUP, _DIM, chunk, 4096 + chunk)
    where = f"{hot} tokens hot" if not bits else f"{hot} tokens hot, {cold} cold pages of {bits} bits"
    return Timed("paged_attention", f"chunk of {chunk} {_name(dtype)}, {where}", 0, clock.seconds(calls))


def codec(device: torch.device, clock: Clock, bits: int) -> Iterator[Timed]:
    """2048 cold pages written and read."""
    dtype, pages = torch.bfloat16, 2048
    cold = ColdFormat(bits, _DIM, _BLOCK * 2 * _DIM * dtype.itemsize)
    keys, values = (torch.randn(pages, cold.capacity, _DIM, device=device).to(dtype) for _ in range(2))
    counts = torch.full((pages,), cold.capacity, device=device)
    raw = torch.zeros(pages, cold.page_bytes, dtype=torch.uint8, device=device)
    targets = torch.randperm(pages, device=device)
    useful = 2 * keys.numel() * dtype.itemsize + raw.numel()

    def write_by_torch() -> None:
        raw[targets] = encode_pages(cold, keys, values, counts)

    writers: dict[str, Callable[[], Any]] = {
        "deltamem": lambda: encode_delta(cold, keys, values, counts, raw, targets),
        "torch": write_by_torch,
    }
    readers: dict[str, Callable[[], Any]] = {
        "deltamem": lambda: decode_delta(cold, raw, targets, dtype),
        "torch": lambda: decode_pages(cold, raw[targets]),
    }
    name = f"{pages} pages of {cold.capacity} tokens, {bits} bits, D {_DIM}, {_name(dtype)}"
    yield Timed("encode_delta", name, useful, clock.seconds(writers))
    yield Timed("decode_delta", name, useful, clock.seconds(readers))


def gather(device: torch.device, clock: Clock) -> Timed:
    """A quarter of 16384 pages filled with tokens of the others; each round moves what the last one left."""
    dtype, pages = torch.bfloat16, 16384
    case = make_attention("slot_major", dtype, _DIM, _BLOCK, 1, [1], [_BLOCK])
    pool = torch.randn(pages, _BLOCK * 2 * _DIM, device=device).to(dtype)
    count = pages // 4 * _BLOCK
    page = torch.randint(pages, (count,), device=device)
    slot = torch.randint(_BLOCK, (count,), device=device)
    targets = torch.randperm(pages, device=device)[: pages // 4]
    mover = DealtPages(case.hot)

    def by_torch() -> None:
        mover.scatter(pool, targets, *mover.gather(pool, page, slot))

    calls: dict[str, Callable[[], Any]] = {
        "deltamem": lambda: gather_pages(pool, case.hot, page, slot, targets),
        "torch": by_torch,
    }
    useful = 2 * count * 2 * _DIM * dtype.itemsize
    return Timed("gather_pages", f"{count} tokens, D {_DIM}, {_name(dtype)}", useful, clock.seconds(calls))


def utility(device: torch.device, clock: Clock) -> Timed:
    """One layer of one request of 8192 tokens, window of 32 queries."""
    dtype, window = torch.bfloat16, 32
    hot = make_attention("slot_major", dtype, _DIM, _BLOCK, _GROUP, [1] * _HEADS, [_CONTEXT] * _HEADS)
    case = on_device(hot, device)
    queries = torch.randn(_HEADS, _GROUP, window, _DIM, device=device).to(dtype)
    mover, scorer = DealtPages(case.hot), DeltaScorer()

    def by_torch() -> Tensor:
        keys, values = mover.read(case.pool, case.block_table, _CONTEXT)
        return scorer.score(ScoreView(keys, values, queries.flatten(0, 1), case.scale))

    calls: dict[str, Callable[[], Any]] = {
        "deltamem": lambda: page_utility(queries, case.pool, case.hot, case.block_table, case.seq_lens, case.scale),
        "torch": by_torch,
    }
    name = f"{_HEADS} kv heads, G {_GROUP}, {_CONTEXT} tokens, window {window}, D {_DIM}, {_name(dtype)}"
    return Timed("page_utility", name, case.bytes_read, clock.seconds(calls))


def dealing(device: torch.device, clock: Clock) -> Timed:
    """The pages of one request of 8192 tokens dealt to 32 layers, in torch: there is no kernel of ours."""
    utilities = torch.rand(32, _HEADS, _CONTEXT // _BLOCK, device=device).sort(descending=True).values
    calls: dict[str, Callable[[], Any]] = {"deltamem": lambda: deal(utilities, _BLOCK, _CONTEXT // _BLOCK // 10, 1)}
    name = f"{utilities.numel()} pages, in torch"
    return Timed("deal_pages", name, utilities.numel() * 4, clock.seconds(calls))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
