# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The tokens of cold pages, decoded. `cold_pages.decode_delta` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from deltamem_vllm.triton_kernels.unpack_codes import split_codes


@triton.jit
def decode_page(
    raw: tl.tensor,
    pages: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    counts: tl.tensor,
    num_pages: tl.tensor,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BITS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    KEY_SCALE: tl.constexpr,
    KEY_ZERO: tl.constexpr,
    VALUE_SCALE: tl.constexpr,
    VALUE_ZERO: tl.constexpr,
    KEY_CODES: tl.constexpr,
    VALUE_CODES: tl.constexpr,
    COLD_TILE: tl.constexpr,
) -> None:
    """Some tokens of one page; grid ``(p, tiles of a page)``.

    Parameters
    ----------
    raw: the pool as bytes, pages PAGE_BYTES apart; pages: ``[p]``, cut to 0 to num_pages - 1.
    keys, values: ``[p, CAPACITY, D]`` float, written, zeros past a page's tokens; counts: ``[p]`` int64, written.
    COLD_TILE: tokens of a program, a power of two; they share ``COLD_TILE * BITS / 8`` bytes of each channel.
    """
    PARTS: tl.constexpr = 8 // BITS
    part_bytes: tl.constexpr = COLD_TILE // PARTS
    row_bytes: tl.constexpr = CAPACITY // PARTS
    index = tl.program_id(0).to(tl.int64)
    number = tl.minimum(tl.maximum(tl.load(pages + index), 0), num_pages - 1).to(tl.int64)
    page = raw + number * PAGE_BYTES
    count = tl.minimum(tl.maximum(tl.load(page.to(tl.pointer_type(tl.int32))), 0), CAPACITY)
    if tl.program_id(1) == 0:
        tl.store(counts + index, count.to(tl.int64))

    column = tl.arange(0, D_PADDED)
    dim = column // (D_PADDED // PARTS) * (D // PARTS) + column % (D_PADDED // PARTS)
    filled = column % (D_PADDED // PARTS) < D // PARTS
    byte_0 = tl.program_id(1) * part_bytes
    token_column = tl.arange(0, COLD_TILE)
    place = byte_0 + token_column % part_bytes
    token = token_column // part_bytes * row_bytes + place
    exists = place < row_bytes
    there = exists & (token < count)
    at = index * (CAPACITY * D) + token[:, None] * D + dim[None, :]
    inside = exists[:, None] & filled[None, :]

    # Products of a scale (11 bits) and a code are exact: fused or not, the sum is rounded once.
    halves = page.to(tl.pointer_type(tl.float16))
    scale = tl.load(halves + KEY_SCALE // 2 + dim, mask=filled, other=0.0).to(tl.float32)
    zero = tl.load(halves + KEY_ZERO // 2 + dim, mask=filled, other=0.0).to(tl.float32)
    byte = byte_0 + tl.arange(0, part_bytes)
    packed = tl.load(
        page + KEY_CODES + dim[:, None] * row_bytes + byte[None, :],
        mask=filled[:, None] & (byte < row_bytes)[None, :],
        other=0,
    )
    codes = tl.trans(split_codes(packed, BITS)).to(tl.float32)
    tile = tl.where(there[:, None], tl.fma(codes, scale[None, :], zero[None, :]), 0.0)
    tl.store(keys + at, tile.to(keys.dtype.element_ty), mask=inside)

    scale = tl.load(halves + VALUE_SCALE // 2 + token, mask=there, other=0.0).to(tl.float32)
    zero = tl.load(halves + VALUE_ZERO // 2 + token, mask=there, other=0.0).to(tl.float32)
    value_byte = tl.arange(0, D_PADDED // PARTS)
    packed = tl.load(
        page + VALUE_CODES + token[:, None] * (D // PARTS) + value_byte[None, :],
        mask=there[:, None] & (value_byte < D // PARTS)[None, :],
        other=0,
    )
    # Past the last token scale and zero are 0, and so is the product of a scale and any code.
    tile = tl.fma(split_codes(packed, BITS).to(tl.float32), scale[:, None], zero[:, None])
    tl.store(values + at, tile.to(values.dtype.element_ty), mask=inside)
