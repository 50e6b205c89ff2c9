# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the window's queries read, with the heaviest entry of each apart. `utility.page_utility` launches it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def window_outputs(
    queries: tl.tensor,
    pool: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    top_logit: tl.tensor,
    top_index: tl.tensor,
    top_value: tl.tensor,
    rest_lse: tl.tensor,
    rest_output: tl.tensor,
    scale: tl.tensor,
    num_pages: tl.tensor,
    splits: tl.tensor,
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
    """ROWS queries of one sequence over one share of its tokens; grid ``(S, ceil(num_rows / ROWS), splits)``.

    One entry may hold all but a rounding error of a query's weight. Then the weight of the others and the distance of
    its value from the output are rounding noise, unless that entry is kept apart from the start.

    Parameters
    ----------
    queries: ``[S, num_rows, D]``, rows of a query head one behind the other: row r is query ``r % window``, which sees
        the first ``seq_lens - window + r % window + 1`` tokens.
    pool, block_table, seq_lens: as of `attend_pages`.
    top_logit, top_index: ``[S, num_rows, splits]`` float32 and int32, the largest logit and the token it is of; -inf
        and -1 where the share has none. top_value: ``[S, num_rows, splits, D]`` float32, its value.
    rest_lse, rest_output: ``[S, num_rows, splits]`` and ``[.., D]`` float32: log-sum-exp and attention of the other
        tokens; -inf and zeros where there are none.
    """
    sequence = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    live = row < num_rows
    dim = tl.arange(0, D_PADDED)
    filled = dim < D
    q = tl.load(
        queries + ((sequence * num_rows + row) * D)[:, None] + dim[None, :],
        mask=live[:, None] & filled[None, :],
        other=0.0,
    )
    length = tl.minimum(tl.maximum(tl.load(seq_lens + sequence), 0), table_width * BLOCK_SIZE)
    visible = length - window + row % window + 1
    share = tl.cdiv(tl.cdiv(length, TILE), splits)
    tiles = tl.minimum((split + 1) * share, tl.cdiv(length, TILE))

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    index = tl.full((ROWS,), -1, tl.int32)
    value = tl.zeros((ROWS, D_PADDED), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D_PADDED), tl.float32)
    within = tl.arange(0, TILE)
    for unit in range(split * share, tiles):
        token = unit * TILE + within
        there = token < length
        number = tl.load(block_table + sequence * table_stride + token // BLOCK_SIZE, mask=there, other=0)
        page = tl.minimum(tl.maximum(number, 0), num_pages - 1).to(tl.int64) * PAGE_STRIDE
        slot = token % BLOCK_SIZE
        k = tl.load(
            pool + (page + K_BASE + slot * K_SLOT)[None, :] + dim[:, None] * K_DIM,
            mask=there[None, :] & filled[:, None],
            other=0.0,
        )
        v = tl.load(
            pool + (page + V_BASE + slot * V_SLOT)[:, None] + dim[None, :] * V_DIM,
            mask=there[:, None] & filled[None, :],
            other=0.0,
        )
        logits = tl.dot(q, k, input_precision="tf32x3") * scale
        logits = tl.where(token[None, :] < visible[:, None], logits, float("-inf"))
        highest = tl.max(logits, 1)
        taken = highest > top  # never where the tile has nothing to see
        chosen = (token[None, :] == (unit * TILE + tl.argmax(logits, 1))[:, None]) & taken[:, None]
        rest = tl.where(chosen, float("-inf"), logits)
        dropped = tl.where(taken, top, float("-inf"))  # the former top joins the others

        higher = tl.maximum(tl.maximum(peak, tl.max(rest, 1)), dropped)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(rest - base[:, None])
        back = tl.exp(dropped - base)
        shrink = tl.exp(peak - base)
        total = total * shrink + tl.sum(weights, 1) + back
        acc = acc * shrink[:, None] + value * back[:, None]
        acc += tl.dot(weights, v.to(tl.float32), input_precision="tf32x3")
        peak = higher
        found = tl.dot(chosen.to(v.dtype), v, input_precision="tf32x3")
        value = tl.where(taken[:, None], found, value)
        index = tl.where(taken, tl.max(tl.where(chosen, token[None, :], -1), 1), index)
        top = tl.maximum(top, highest)

    at = (sequence * num_rows + row) * splits + split
    some = total > 0.0
    tl.store(top_logit + at, top, mask=live)
    tl.store(top_index + at, index, mask=live)
    tl.store(rest_lse + at, tl.where(some, peak + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=live)
    wide = at[:, None] * D + dim[None, :]
    tl.store(top_value + wide, value, mask=live[:, None] & filled[None, :])
    acc = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(rest_output + wide, acc, mask=live[:, None] & filled[None, :])
