# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The native operations on tiny inputs, against their definitions in `ops/reference*.py`."""

from __future__ import annotations

import torch

from deltamem_vllm.ops import reference_cold
from deltamem_vllm.ops.cold import encode_delta
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import make_dealt_tokens
from deltamem_vllm.ops.inputs_attention import make_attention
from deltamem_vllm.ops.inputs_cold import make_cold_tokens
from deltamem_vllm.ops.paged_attention import paged_attention
from deltamem_vllm.ops.reference import move_dealt
from deltamem_vllm.ops.reference_attention import attend_pages

_TOLERANCE = 1e-4  # the bound of the exactness tests


def run() -> dict[str, str]:
    """Name of each operation -> empty if it is right, else how it is wrong."""
    return {"moving tokens": _moving(), "writing cold pages": _cold_pages(), "attention": _attention()}


def _moving() -> str:
    case = make_dealt_tokens("keys_transposed", 3, 16, 16, 3, 5, torch.float32, seed=0)
    targets = case.targets(case.spare)
    expected = move_dealt(case.pool, case.layout, case.pages, targets, case.kept)
    size = case.layout.block_size
    page = torch.cat([torch.tensor(own)[kept // size] for own, kept in zip(case.pages, case.kept, strict=True)])
    slot = torch.cat([kept % size for kept in case.kept])
    pool = case.pool.clone()
    places = torch.tensor([page for own in targets for page in own])
    DealtPages(case.layout).move(pool, page, slot, places, False)
    wrong = int((pool.view(torch.int32) != expected.view(torch.int32)).sum())
    return f"{wrong} of {pool.numel()} numbers are wrong" if wrong else ""


def _cold_pages() -> str:
    case = make_cold_tokens("normal", 4, 16, 16, 2, torch.float32, seed=0)
    raw = torch.zeros(2, case.cold.page_bytes, dtype=torch.uint8)
    encode_delta(case.cold, case.keys, case.values, case.counts, raw, torch.tensor([0, 1]))
    wrong = 0
    for page, (keys, values, count) in enumerate(zip(case.keys, case.values, case.counts.tolist(), strict=True)):
        expected = torch.frombuffer(
            bytearray(reference_cold.encode_page(case.cold, keys, values, count)), dtype=torch.uint8
        )
        wrong += int((raw[page] != expected).sum())
    return f"{wrong} of {raw.numel()} bytes are wrong" if wrong else ""


def _attention() -> str:
    case = make_attention("keys_transposed", torch.float32, 16, 16, 2, [1, 3], [20, 9], 4, [1, 0])
    output = torch.full_like(case.query, float("nan"))
    call = (case.block_table, case.seq_lens, case.query_start_loc, case.scale)
    paged_attention(case.query, case.pool, case.hot, *call, output, **case.cold)
    expected, _ = attend_pages(
        case.query, case.pool, case.hot, *call, case.cold_format, case.cold_table, case.cold_pages
    )
    error = float((output.double() - expected).abs().max())
    # Not "error > tolerance": NaN must count as wrong.
    return "" if error <= _TOLERANCE else f"off by {error:.3g}, allowed {_TOLERANCE:g}"
