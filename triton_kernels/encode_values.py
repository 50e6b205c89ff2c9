# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The values of cold pages: scale and codes of each token. `cold_pages.encode_delta` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from deltamem_vllm.triton_kernels.quantise import codes_of, divisor_of, range_of


@triton.jit
def encode_values(
    values: tl.tensor,
    counts: tl.tensor,
    raw: tl.tensor,
    targets: tl.tensor,
    num_pages: tl.tensor,
    D: tl.constexpr,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    TOKENS: tl.constexpr,
    BYTES: tl.constexpr,
) -> None:
    """Some tokens of one page; grid ``(p, ceil(CAPACITY / TOKENS))``.

    Parameters
    ----------
    values: ``[p, CAPACITY, D]`` float; counts: ``[p]``, cut to 0 to CAPACITY.
    raw: the pool as bytes, pages PAGE_BYTES apart; scales, zeros and codes of the page's values are written.
    targets: ``[p]``, pages to write; those that do not exist are left out.
    TOKENS: of a program. BYTES: those of a value's codes, rounded up to a power of two.
    """
    index = tl.program_id(0).to(tl.int64)
    number = tl.load(targets + index).to(tl.int64)
    if number < 0:
        return
    if number >= num_pages:
        return
    PARTS: tl.constexpr = 8 // BITS
    row_bytes: tl.constexpr = D // PARTS
    count = tl.minimum(tl.maximum(tl.load(counts + index), 0), CAPACITY).to(tl.int32)
    page = raw + number * PAGE_BYTES
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, BYTES)
    own = values + index * (CAPACITY * D) + tl.minimum(token, CAPACITY - 1)[:, None] * D
    inside = (place < row_bytes)[None, :]

    for part in tl.static_range(PARTS):
        tile = tl.load(own + (part * row_bytes + place)[None, :], mask=inside, other=0.0).to(tl.float32)
        if part == 0:
            lows, highs = tile, tile
        else:
            lows = tl.minimum(lows, tile, propagate_nan=tl.PropagateNan.ALL)
            highs = tl.maximum(highs, tile)
    # A NaN makes all that share its scale 0.
    fine = tl.max((lows != lows).to(tl.int32), 1) == 0
    low = tl.min(tl.where(inside, lows, float("inf")), 1)
    high = tl.max(tl.where(inside, highs, float("-inf")), 1)
    # What stands past the last token has a scale of 0, so that its codes are 0, too.
    scale, zero = range_of(low, high, (token < count) & fine, BITS)
    halves = page.to(tl.pointer_type(tl.float16))
    tl.store(halves + VALUE_SCALE // 2 + token, scale, mask=token < CAPACITY)
    tl.store(halves + VALUE_ZERO // 2 + token, zero, mask=token < CAPACITY)

    step, inverse = divisor_of(scale)
    packed = tl.zeros((TOKENS, BYTES), tl.uint8)
    for part in tl.static_range(PARTS):
        tile = tl.load(own + (part * row_bytes + place)[None, :], mask=inside, other=0.0).to(tl.float32)
        codes = codes_of(tile, scale[:, None], zero[:, None], step[:, None], inverse[:, None], BITS)
        packed |= codes << (BITS * part)
    tl.store(
        page + VALUE_CODES + token[:, None] * row_bytes + place[None, :],
        packed,
        mask=(token < CAPACITY)[:, None] & (place < row_bytes)[None, :],
    )
