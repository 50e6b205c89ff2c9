# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Tokens out of pages into rows, or out of rows into pages. `gather.gather_pages` launches it twice."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_tokens(
    pool: tl.tensor,
    rows: tl.tensor,
    pages: tl.tensor,
    slots: tl.tensor,
    count: tl.tensor,
    num_pages: tl.tensor,
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
    TOKENS: tl.constexpr,
    FILL: tl.constexpr,
) -> None:
    """TOKENS tokens; grid ``(ceil(count / TOKENS),)``.

    Parameters
    ----------
    pool: ``[NP, PAGE_STRIDE]`` of integers as wide as the elements, so that every bit arrives.
    rows: ``[count, 2 * D]``, key and value of each token, in the same type.
    pages, slots: ``[count]``, where the tokens stand, cut to pages and slots that there are; if FILL, pages that are
        filled, ``[count / BLOCK_SIZE]``, and nothing. One that does not exist is not filled.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = token < count
    if FILL:
        number = tl.load(pages + token // BLOCK_SIZE, mask=there, other=0)
        slot = token % BLOCK_SIZE
        there = there & (number >= 0) & (number < num_pages)
    else:
        number = tl.load(pages + token, mask=there, other=0)
        slot = tl.minimum(tl.maximum(tl.load(slots + token, mask=there, other=0), 0), BLOCK_SIZE - 1)
    page = tl.minimum(tl.maximum(number, 0), num_pages - 1).to(tl.int64) * PAGE_STRIDE
    dim = tl.arange(0, D_PADDED)
    row = rows + token.to(tl.int64)[:, None] * (2 * D) + dim[None, :]
    k_at = pool + (page + K_BASE + slot * K_SLOT)[:, None] + dim[None, :] * K_DIM
    v_at = pool + (page + V_BASE + slot * V_SLOT)[:, None] + dim[None, :] * V_DIM
    mask = there[:, None] & (dim < D)[None, :]
    if FILL:
        tl.store(k_at, tl.load(row, mask=mask), mask=mask)
        tl.store(v_at, tl.load(row + D, mask=mask), mask=mask)
    else:
        tl.store(row, tl.load(k_at, mask=mask), mask=mask)
        tl.store(row + D, tl.load(v_at, mask=mask), mask=mask)
