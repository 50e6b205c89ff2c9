# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The definition of attention over hot and cold pages, one query at a time in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.layout import PageLayout
from deltamem_vllm.ops.reference import read_pooled_token


def attend_pages(
    query: Tensor,
    pool: Tensor,
    hot: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    cold_format: ColdFormat | None = None,
    cold_table: Tensor | None = None,
    cold_pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `ops.paged_attention.paged_attention` computes, with its parameters.

    Returns
    -------
    Output ``[T, G, D]`` and log-sum-exp ``[T, G]``, float64. Rows of no sequence are 0.
    """
    output = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:2], float("-inf"), dtype=torch.float64)
    for s, length in enumerate(seq_lens.tolist()):
        first, end = int(query_start_loc[s]), int(query_start_loc[s + 1])
        cold: list[tuple[Tensor, Tensor]] = []
        if cold_format is not None and cold_table is not None and cold_pages is not None:
            for page in cold_table[s, : int(cold_pages[s])].tolist():
                raw = pool[page].view(torch.uint8).unsqueeze(0)
                keys, values, counts = decode_pages(cold_format, raw)
                count = min(int(counts[0]), cold_format.capacity)
                cold += [(keys[0, t], values[0, t]) for t in range(count)]
        size = hot.block_size
        resident = [read_pooled_token(pool, hot, int(block_table[s, t // size]), t % size) for t in range(length)]
        for row in range(first, end):
            seen = cold + resident[: max(0, length - (end - first) + (row - first) + 1)]
            if not seen:
                continue
            keys = torch.stack([key for key, _ in seen]).double()
            values = torch.stack([value for _, value in seen]).double()
            scores = scale * query[row].double() @ keys.T
            output[row] = scores.softmax(-1) @ values
            lse[row] = scores.logsumexp(-1)
    return output, lse
