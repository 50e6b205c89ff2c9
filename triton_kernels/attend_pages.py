# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention of a tile of queries over hot and cold pages: the kernel behind `attention.paged_attention`.

One program reads a share ("split") of the pages of one sequence for a tile of rows, a row being a query of one of the
G heads that share the keys. Decoding has one tile a sequence and many splits, a prefill chunk many tiles and one split;
the kernel is the same. With several splits, each writes its own result and the log-sum-exp that `merge_splits` weighs
it with.

Cold keys are not decoded: with ``k = zero + code * scale`` per channel, ``q . k = q . zero + (q * scale) . code``, so
that scales go into the query, and those of values, which have one a token, into the probabilities.
"""

from __future__ import annotations

import triton
import triton.language as tl

from deltamem_vllm.triton_kernels.unpack_codes import unpack_codes


@triton.jit
def _dot_of_two(left: tl.tensor, right: tl.tensor, TWICE: tl.constexpr) -> tl.tensor:
    """``left @ right`` with float32 `left` rounded to the type of `right`; TWICE adds what rounding cut off."""
    high = left.to(right.dtype)
    total = tl.dot(high, right, input_precision="tf32x3")
    if TWICE:
        total = tl.dot((left - high.to(tl.float32)).to(right.dtype), right, total, input_precision="tf32x3")
    return total


@triton.jit
def _rescale(logits: tl.tensor, top: tl.tensor, total: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """Take a tile of logits (base 2) into a running softmax: probabilities, and the rest on their new scale."""
    higher = tl.maximum(top, tl.max(logits, 1))
    # A row that has seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(top - base)
    return weights, higher, total * shrink + tl.sum(weights, 1), acc * shrink[:, None]


@triton.jit
def attend_pages(
    queries: tl.tensor,
    pool: tl.tensor,
    raw: tl.tensor,
    block_table: tl.tensor,
    seq_lens: tl.tensor,
    cold_table: tl.tensor,
    cold_pages: tl.tensor,
    query_start_loc: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale_log2: tl.tensor,
    num_pages: tl.tensor,
    num_rows: tl.tensor,
    splits: tl.tensor,
    query_stride: tl.tensor,
    head_stride: tl.tensor,
    hot_stride: tl.tensor,
    hot_width: tl.tensor,
    cold_stride: tl.tensor,
    cold_width: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    K_BASE: tl.constexpr,
    K_SLOT: tl.constexpr,
    K_DIM: tl.constexpr,
    V_BASE: tl.constexpr,
    V_SLOT: tl.constexpr,
    V_DIM: tl.constexpr,
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
    DIRECT: tl.constexpr,
) -> None:
    """One sequence, one tile of rows, one split of its pages; grid ``(S, tiles of rows, splits)``.

    Parameters
    ----------
    queries: ``[T, G, D]``, elements of a head side by side; `query_stride` and `head_stride` are its first strides.
    pool: ``[NP, PAGE_STRIDE]``, hot pages in the queries' dtype; raw: the same memory as uint8.
    block_table, cold_table: ``[S, hot_width]``, ``[S, cold_width]`` int32, rows `hot_stride` and `cold_stride` apart;
        seq_lens, cold_pages: ``[S]`` int32.
    query_start_loc: ``[S + 1]`` int32.
    out: ``[T, G, D]`` in the queries' dtype if DIRECT, otherwise ``[T, G, splits, D]`` float32.
    lse: ``[T, G, splits]`` float32, natural logarithm; -inf where nothing was read.
    scale_log2: factor on q . k, times log2(e).
    num_pages, num_rows: NP and T. Numbers of pages, counts and rows are cut to what there is: a broken table gives
        wrong results but reads nothing outside the pool.
    ROWS: rows of a tile, ``ROWS // G`` queries. TILE, COLD_TILE: tokens that are read together. BITS: of cold pages, 0
        without any. D_PADDED: D rounded up to a power of two. The others say where things are in a page.
    """
    sequence = tl.program_id(0)
    split = tl.program_id(2)
    first = tl.maximum(tl.load(query_start_loc + sequence), 0)
    count = tl.minimum(tl.load(query_start_loc + sequence + 1), num_rows) - first
    tile_queries: tl.constexpr = ROWS // G
    begin = tl.program_id(1) * tile_queries
    if begin >= count:
        return

    row = tl.arange(0, ROWS)
    query = begin + row // G
    live = (row < tile_queries * G) & (query < count)
    row_index = (first + query).to(tl.int64)
    head = row % G

    # Codes of one byte belong to columns far apart. Where D is no power of two, each part of the columns is padded by
    # itself, so that they come out of their bytes in the order that everything else has.
    PARTS: tl.constexpr = 8 // BITS if BITS > 0 else 1
    column = tl.arange(0, D_PADDED)
    dim = column
    filled = column < D
    if PARTS > 1 and D_PADDED != D:
        dim = column // (D_PADDED // PARTS) * (D // PARTS) + column % (D_PADDED // PARTS)
        filled = column % (D_PADDED // PARTS) < D // PARTS
    q = tl.load(
        queries + row_index[:, None] * query_stride + head[:, None] * head_stride + dim[None, :],
        mask=live[:, None] & filled[None, :],
        other=0.0,
    )

    length = tl.minimum(tl.maximum(tl.load(seq_lens + sequence), 0), hot_width * BLOCK_SIZE)
    visible = length - count + query + 1  # hot tokens that a row may read
    hot_end = tl.minimum(length, length - count + begin + tile_queries)
    hot_tiles = tl.cdiv(tl.maximum(hot_end, 0), TILE)
    cold_tiles = 0
    if BITS > 0:
        page_tiles: tl.constexpr = (CAPACITY // PARTS + COLD_TILE // PARTS - 1) // (COLD_TILE // PARTS)
        cold_tiles = tl.minimum(tl.maximum(tl.load(cold_pages + sequence), 0), cold_width) * page_tiles
    share = tl.cdiv(cold_tiles + hot_tiles, splits)
    low = split * share
    high = tl.minimum(low + share, cold_tiles + hot_tiles)

    lse_at = lse + (row_index * G + head) * splits + split
    if not DIRECT:  # noqa: SIM102 - known when compiling, unlike what is inside
        if low >= high:
            tl.store(lse_at, tl.full((ROWS,), float("-inf"), tl.float32), mask=live)
            return

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D_PADDED), tl.float32)

    if BITS > 0:
        WIDE: tl.constexpr = q.dtype == tl.float32
        CODE: tl.constexpr = tl.float32 if WIDE else tl.bfloat16
        MIDDLE: tl.constexpr = 2 ** (BITS - 1)
        part_bytes: tl.constexpr = COLD_TILE // PARTS
        row_bytes: tl.constexpr = CAPACITY // PARTS
        part_column = tl.arange(0, COLD_TILE)
        value_byte = tl.arange(0, D_PADDED // PARTS)
        q_wide = q.to(tl.float32)
        for unit in range(tl.minimum(low, cold_tiles), tl.minimum(high, cold_tiles)):
            number = tl.load(cold_table + sequence.to(tl.int64) * cold_stride + unit // page_tiles)
            number = tl.minimum(tl.maximum(number, 0), num_pages - 1)
            page = raw + number.to(tl.int64) * PAGE_BYTES
            tokens = tl.load(page.to(tl.pointer_type(tl.int32)))
            byte_0 = unit % page_tiles * part_bytes
            place = byte_0 + part_column % part_bytes
            token = part_column // part_bytes * row_bytes + place
            there = (place < row_bytes) & (token < tokens)  # token < C follows from the first half

            halves = page.to(tl.pointer_type(tl.float16))
            k_scale = tl.load(halves + KEY_SCALE // 2 + dim, mask=filled, other=0.0).to(tl.float32)
            k_zero = tl.load(halves + KEY_ZERO // 2 + dim, mask=filled, other=0.0).to(tl.float32) + MIDDLE * k_scale
            byte = byte_0 + tl.arange(0, part_bytes)
            k_bytes = tl.load(
                page + KEY_CODES + dim[:, None] * row_bytes + byte[None, :],
                mask=filled[:, None] & (byte < row_bytes)[None, :],
                other=0,
            )
            # Twice: the scaled query is no longer a number of the model's dtype, and errors here are exponentiated.
            logits = _dot_of_two(q_wide * k_scale[None, :], unpack_codes(k_bytes, BITS).to(CODE), not WIDE)
            logits += tl.sum(q_wide * k_zero[None, :], 1)[:, None]
            logits = tl.where(there[None, :], logits * scale_log2, float("-inf"))
            weights, top, total, acc = _rescale(logits, top, total, acc)
            v_scale = tl.load(halves + VALUE_SCALE // 2 + token, mask=there, other=0.0).to(tl.float32)
            v_zero = tl.load(halves + VALUE_ZERO // 2 + token, mask=there, other=0.0).to(tl.float32) + MIDDLE * v_scale
            v_bytes = tl.load(
                page + VALUE_CODES + token[:, None] * (D // PARTS) + value_byte[None, :],
                mask=there[:, None] & (value_byte < D // PARTS)[None, :],
                other=0,
            )
            # float16 models: bfloat16 alone would lose three bits of the probabilities.
            acc += _dot_of_two(weights * v_scale[None, :], unpack_codes(v_bytes, BITS).to(CODE), q.dtype == tl.float16)
            acc += tl.sum(weights * v_zero[None, :], 1)[:, None]

    within = tl.arange(0, TILE)
    for unit in range(tl.maximum(low - cold_tiles, 0), tl.maximum(high - cold_tiles, 0)):
        token = unit * TILE + within
        there = token < hot_end
        number = tl.load(block_table + sequence.to(tl.int64) * hot_stride + token // BLOCK_SIZE, mask=there, other=0)
        number = tl.minimum(tl.maximum(number, 0), num_pages - 1)
        page = number.to(tl.int64) * PAGE_STRIDE
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
        logits = tl.dot(q, k, input_precision="tf32x3") * scale_log2
        logits = tl.where(token[None, :] < visible[:, None], logits, float("-inf"))
        weights, top, total, acc = _rescale(logits, top, total, acc)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="tf32x3")

    # Nothing read: zeros.
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    base = tl.where(total > 0.0, top, 0.0)
    tl.store(lse_at, (base + tl.log2(total)) * 0.6931471805599453, mask=live)
    out_at = ((row_index * G + head) * splits + split)[:, None] * D + dim[None, :]
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=live[:, None] & filled[None, :])
