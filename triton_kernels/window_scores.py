# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The delta-scores of a page's entries, given what the window's queries read. `utility.page_utility` launches it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_scores(
    queries: tl.tensor,
    pool: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    lse: tl.tensor,
    outputs: tl.tensor,
    top_index: tl.tensor,
    top_moved: tl.tensor,
    scores: tl.tensor,
    sums: tl.tensor,
    scale: tl.tensor,
    num_pages: tl.tensor,
    num_rows: tl.tensor,
    window: tl.tensor,
    table_stride: tl.tensor,
    table_width: tl.tensor,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    K_BASE: tl.constexpr,
    K_SLOT: tl.constexpr,
    K_DIM: tl.constexpr,
    V_BASE: tl.constexpr,
    V_SLOT: tl.constexpr,
    V_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One page of one sequence; grid ``(S, table_width)``.

    Parameters
    ----------
    queries, pool, block_table, seq_lens, num_rows, window: as of `window_outputs`.
    lse: ``[S, num_rows]`` float32, log-sum-exp of all tokens a row sees. outputs: ``[S, num_rows, D]`` float32.
    top_index, top_moved: ``[S, num_rows]``, the heaviest token of each row, and how far the output moves without it.
    scores: ``[S, table_width * BLOCK_SIZE]`` float32, written; 0 where there is no token.
    sums: ``[S, table_width]`` float32, written.
    TILE: tokens that are scored together.
    """
    sequence = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    length = tl.minimum(tl.maximum(tl.load(seq_lens + sequence), 0), table_width * BLOCK_SIZE)
    number = tl.load(block_table + sequence * table_stride + place)
    page = tl.minimum(tl.maximum(number, 0), num_pages - 1).to(tl.int64) * PAGE_STRIDE
    dim = tl.arange(0, D_PADDED)
    filled = dim < D
    page_sum = 0.0
    for begin in range(0, BLOCK_SIZE, TILE):
        slot = begin + tl.arange(0, TILE)
        token = place * BLOCK_SIZE + slot
        there = (slot < BLOCK_SIZE) & (token < length)
        mask = there[None, :] & filled[:, None]
        k = tl.load(pool + (page + K_BASE + slot * K_SLOT)[None, :] + dim[:, None] * K_DIM, mask=mask, other=0.0)
        v = tl.load(pool + (page + V_BASE + slot * V_SLOT)[None, :] + dim[:, None] * V_DIM, mask=mask, other=0.0)
        v = v.to(tl.float32)
        norm2 = tl.sum(v * v, 0)
        largest2 = tl.zeros((TILE,), tl.float32)
        for first in range(0, num_rows, ROWS):
            row = first + tl.arange(0, ROWS)
            live = row < num_rows
            at = sequence * num_rows + row
            tile = live[:, None] & filled[None, :]
            q = tl.load(queries + at[:, None] * D + dim[None, :], mask=tile, other=0.0)
            o = tl.load(outputs + at[:, None] * D + dim[None, :], mask=tile, other=0.0)
            total = tl.load(lse + at, mask=live, other=float("inf"))
            heaviest = tl.load(top_index + at, mask=live, other=-1)
            moved = tl.load(top_moved + at, mask=live, other=0.0)
            visible = length - window + row % window + 1
            seen = (token[None, :] < visible[:, None]) & (token[None, :] != heaviest[:, None])
            logits = tl.dot(q, k, input_precision="tf32x3") * scale
            weight = tl.where(seen, tl.exp(logits - total[:, None]), 0.0)
            # All but the heaviest have at most half of the weight, up to rounding.
            ratio = weight / (1.0 - tl.minimum(weight, 0.5))
            # ||v - o||^2 expanded; rounding may leave it below zero.
            far2 = norm2[None, :] - 2.0 * tl.dot(o, v, input_precision="tf32x3") + tl.sum(o * o, 1)[:, None]
            by_row = tl.maximum(ratio * ratio * far2, 0.0)
            by_row = tl.where(token[None, :] == heaviest[:, None], (moved * moved)[:, None], by_row)
            largest2 = tl.maximum(largest2, tl.max(by_row, 0))
        score = tl.where(there, tl.sqrt(largest2), 0.0)
        page_sum += tl.sum(score, 0)
        tl.store(scores + sequence * table_width * BLOCK_SIZE + token, score, mask=slot < BLOCK_SIZE)
    tl.store(sums + sequence * table_width + place, page_sum)
