# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The keys of cold pages: scales and codes of channels, and the header. `cold_pages.encode_delta` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from deltamem_vllm.triton_kernels.quantise import codes_of, divisor_of, range_of


@triton.jit
def encode_keys(
    keys: tl.tensor,
    counts: tl.tensor,
    raw: tl.tensor,
    targets: tl.tensor,
    num_pages: tl.tensor,
    D: tl.constexpr,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    KEY_ZERO: tl.constexpr,
    KEY_CODES: tl.constexpr,
    USED_BYTES: tl.constexpr,
    ALL_BYTES: tl.constexpr,
    HEADER: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """Some channels of one page; grid ``(p, ceil(D / CHANNELS))``.

    Parameters
    ----------
    keys: ``[p, CAPACITY, D]`` float; counts: ``[p]``, cut to 0 to CAPACITY.
    raw: the pool as bytes, pages PAGE_BYTES apart; header, scales, zeros and codes of the page are written, and zeros
        from USED_BYTES to ALL_BYTES.
    targets: ``[p]``, pages to write; those that do not exist are left out.
    CHANNELS: of a program. TOKENS: the tokens that share no byte, rounded up to a power of two.
    """
    index = tl.program_id(0).to(tl.int64)
    number = tl.load(targets + index).to(tl.int64)
    if number < 0:
        return
    if number >= num_pages:
        return
    PARTS: tl.constexpr = 8 // BITS
    row_bytes: tl.constexpr = CAPACITY // PARTS
    count = tl.minimum(tl.maximum(tl.load(counts + index), 0), CAPACITY).to(tl.int32)
    page = raw + number * PAGE_BYTES
    dim = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = tl.arange(0, TOKENS)
    own = keys + index * (CAPACITY * D) + dim[None, :]

    inside = (dim < D)[None, :]
    for part in tl.static_range(PARTS):
        # Where there is no token stands the first one once more: it moves no bound.
        token = part * row_bytes + place
        token = tl.where((place < row_bytes) & (token < count), token, 0)
        tile = tl.load(own + token[:, None] * D, mask=inside, other=0.0).to(tl.float32)
        if part == 0:
            lows, highs = tile, tile
        else:
            lows = tl.minimum(lows, tile, propagate_nan=tl.PropagateNan.ALL)
            highs = tl.maximum(highs, tile)
    # A NaN makes all that share its scale 0.
    fine = tl.max((lows != lows).to(tl.int32), 0) == 0
    scale, zero = range_of(tl.min(lows, 0), tl.max(highs, 0), (count > 0) & fine, BITS)
    halves = page.to(tl.pointer_type(tl.float16))
    tl.store(halves + KEY_SCALE // 2 + dim, scale, mask=dim < D)
    tl.store(halves + KEY_ZERO // 2 + dim, zero, mask=dim < D)

    step, inverse = divisor_of(scale)
    packed = tl.zeros((TOKENS, CHANNELS), tl.uint8)
    for part in tl.static_range(PARTS):
        token = part * row_bytes + place
        there = ((place < row_bytes) & (token < count))[:, None] & inside
        tile = tl.load(own + token[:, None] * D, mask=there, other=float("-inf")).to(tl.float32)
        codes = codes_of(tile, scale[None, :], zero[None, :], step[None, :], inverse[None, :], BITS)
        packed |= codes << (BITS * part)
    tl.store(
        page + KEY_CODES + dim[None, :] * row_bytes + place[:, None],
        packed,
        mask=(dim < D)[None, :] & (place < row_bytes)[:, None],
    )

    if tl.program_id(1) == 0:
        # The header is the count and zeros; as words, since a page begins at a multiple of 4 bytes.
        word = tl.arange(0, HEADER // 4)
        tl.store(page.to(tl.pointer_type(tl.int32)) + word, tl.where(word == 0, count, 0))
        for start in tl.static_range(USED_BYTES, ALL_BYTES, 1024):
            byte = start + tl.arange(0, 1024)
            tl.store(page + byte, tl.zeros((1024,), tl.uint8), mask=byte < ALL_BYTES)
