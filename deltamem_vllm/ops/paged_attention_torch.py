# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention over hot and cold pages in plain torch, one sequence at a time: for machines without the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.dealt_pages import DealtPages


def attend(
    query: Tensor,
    pool: Tensor,
    mover: DealtPages,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    output: Tensor,
    cold_format: ColdFormat | None,
    cold_table: Tensor | None,
    cold_pages: Tensor | None,
    lse: Tensor | None,
) -> None:
    """As `paged_attention.paged_attention`, whose checks have been made; float32 inside."""
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for s, length in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        count = rows.stop - rows.start
        if not count:
            continue
        keys, values = (part.float() for part in mover.read(pool, block_table[s : s + 1], length))
        older = 0
        if cold_format is not None and cold_table is not None and cold_pages is not None:
            raw = pool.view(torch.uint8).index_select(0, cold_table[s, : int(cold_pages[s])].long())
            coded_keys, coded_values, tokens = decode_pages(cold_format, raw)
            there = torch.arange(cold_format.capacity) < tokens.unsqueeze(1)
            older = int(there.sum())
            keys = torch.cat([coded_keys[there].unsqueeze(0), keys], 1)
            values = torch.cat([coded_values[there].unsqueeze(0), values], 1)
        if not keys.shape[1]:
            output[rows] = 0
            if lse is not None:
                lse[rows] = float("-inf")
            continue
        logits = torch.einsum("tgd,nd->gtn", query[rows].float(), keys[0]) * scale
        # Query i of the last ones sees what stands up to its own place.
        last = older + length - count + torch.arange(count)
        logits.masked_fill_(torch.arange(older + length) > last.unsqueeze(1), float("-inf"))
        # Chunks may be longer than what is resident: their first queries see nothing.
        weights = logits.softmax(-1).masked_fill(last.lt(0).view(1, -1, 1), 0.0)
        output[rows] = torch.einsum("gtn,nd->tgd", weights, values[0]).to(output.dtype)
        if lse is not None:
            lse[rows] = logits.logsumexp(-1).T
