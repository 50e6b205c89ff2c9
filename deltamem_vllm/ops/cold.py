# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Cold pages written and read in the pool: checked, native on CPU, else `codec/cold_codec.py`'s torch version.

All give the same bytes. A NaN among the numbers that share a scale (a key channel of a page, one value) makes all of
them 0; infinities are kept within float16's range; a zero is stored without its sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops import native
from deltamem_vllm.ops.checks import check_ids, check_places
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.gather import PoolStrides, kept_memory, kept_pages, streamed
from deltamem_vllm.ops.layout import PageLayout


def encode_delta(cold: ColdFormat, keys: Tensor, values: Tensor, counts: Tensor, raw: Tensor, targets: Tensor) -> None:
    """Write tokens into cold pages.

    Parameters
    ----------
    cold: format of the pages.
    keys, values: ``[p, C, D]`` float32, bfloat16 or float16; what stands past a page's tokens is ignored.
    counts: ``[p]`` int32 or int64, tokens of each page, 1 to C.
    raw: ``[num_pages, page_bytes]`` uint8, the pool as bytes; modified.
    targets: ``[p]`` int32 or int64, distinct ids of the pages to write.

    Raises
    ------
    ValueError: a shape, dtype or device does not fit, a count or page number is out of range.
    """
    _check_raw(cold, raw)
    shape = (targets.shape[0], cold.capacity, cold.head_size)
    for name, part in (("keys", keys), ("values", values)):
        if part.shape != shape or part.dtype not in native.DTYPE_CODES or part.dtype != keys.dtype:
            raise ValueError(
                f"{name} of {shape[0]} cold pages must be {shape} in float32, bfloat16 or float16, keys and values "
                f"alike, got {tuple(part.shape)} in {part.dtype}"
            )
    counts = check_ids("counts", counts, shape[:1], cold.capacity + 1, 1)
    targets = check_ids("targets", targets, shape[:1], raw.shape[0])
    library = native.library() if raw.device.type == "cpu" else None
    if library is None:
        raw[targets] = encode_pages(cold, keys, values, counts)
        return
    keys, values = keys.contiguous(), values.contiguous()
    library.deltamem_encode_delta(
        *_format_arguments(cold, keys.dtype, shape[0]),
        *map(native.pointer, (keys, values, counts, targets, raw)),
        native.int64(raw.stride(0)),
    )


def decode_delta(
    cold: ColdFormat, raw: Tensor, ids: Tensor, dtype: torch.dtype, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the tokens of cold pages.

    Parameters
    ----------
    cold: format of the pages.
    raw: ``[num_pages, page_bytes]`` uint8, the pool as bytes.
    ids: ``[p]`` int32 or int64, pages to read; they may repeat.
    dtype: of the result: float32, bfloat16 or float16. Numbers are worked out in float32 and rounded once.
    out: where to put the result: what this function would return, contiguous.

    Returns
    -------
    Keys and values, ``[p, C, D]``, zeros past a page's tokens, and the tokens of each page, ``[p]`` int64: what the
    header says, but no less than 0 and no more than C.

    Raises
    ------
    ValueError: a shape or dtype does not fit, or a page number is out of range.
    """
    _check_raw(cold, raw)
    _check_dtype(dtype)
    ids = check_ids("ids", ids, (ids.shape[0],) if ids.dim() else (1,), raw.shape[0])
    count = ids.shape[0]
    keys, values, counts = _decoded(cold, count, dtype, raw.device) if out is None else out
    _check_out(cold, count, dtype, keys, values, counts)
    library = native.library() if raw.device.type == "cpu" else None
    if library is None:
        for part, read in zip((keys, values, counts), decode_pages(cold, raw[ids]), strict=True):
            part.copy_(read)
        return keys, values, counts
    library.deltamem_decode_delta(
        *_format_arguments(cold, dtype, count),
        native.pointer(raw),
        native.int64(raw.stride(0)),
        *map(native.pointer, (ids, keys, values, counts)),
        None,
        streamed(keys.nbytes + values.nbytes),
    )
    return keys, values, counts


def read_tokens(cold: ColdFormat, raw: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Read the tokens of cold pages, those of a page right behind those of the page before.

    Parameters
    ----------
    cold, raw, ids, dtype: as of `decode_delta`.

    Returns
    -------
    Keys and values, ``[m, D]``, and the tokens of each page, ``[p]`` int64, which sum up to m. Keys and values may lie
    in memory that this thread uses again for the next cold pages that it reads or moves.

    Raises
    ------
    ValueError: as `decode_delta`.
    """
    library = native.library() if raw.device.type == "cpu" else None
    if library is None:
        keys, values, counts = decode_delta(cold, raw, ids, dtype)
        there = torch.arange(cold.capacity, device=raw.device) < counts.unsqueeze(1)
        return keys[there], values[there], counts
    _check_raw(cold, raw)
    _check_dtype(dtype)
    ids = check_ids("ids", ids, (ids.shape[0],) if ids.dim() else (1,), raw.shape[0])
    count = ids.shape[0]
    counts = raw[ids, :4].view(torch.int32).flatten().long().clamp_(0, cold.capacity)
    starts = torch.zeros(count + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    tokens = kept_memory((2, int(starts[-1]), cold.head_size), dtype)
    library.deltamem_decode_delta(
        *_format_arguments(cold, dtype, count),
        native.pointer(raw),
        native.int64(raw.stride(0)),
        *map(native.pointer, (ids, tokens[0], tokens[1], counts, starts)),
        streamed(tokens.nbytes),
    )
    return tokens[0], tokens[1], counts


def encode_from(
    pool: Tensor, layout: PageLayout, cold: ColdFormat, pages: Tensor, slots: Tensor, counts: Tensor, targets: Tensor
) -> None:
    """Make cold pages of tokens that stand in hot pages of the same pool.

    Parameters
    ----------
    pool: ``[num_pages, block_size * 2 * D]`` float32, bfloat16 or float16; modified.
    layout: of the hot pages.
    cold: format of the cold pages.
    pages, slots: ``[p, C]`` int64, page and slot of every token; entries past a page's count are ignored, whatever
        they are.
    counts: ``[p]`` int32 or int64, tokens of each cold page, 1 to C.
    targets: ``[p]`` int32 or int64, distinct ids of the pages that become cold. They may be among ``pages``: all tokens
        are read before the first such page is written.

    Raises
    ------
    ValueError: a shape or dtype does not fit, or a count, page number or slot is out of range.
    """
    if pool.dtype not in native.DTYPE_CODES:
        raise ValueError(f"cold pages are made of float32, bfloat16 or float16 pages, not of {pool.dtype}")
    strides = PoolStrides.of(pool, layout)
    raw = pool.view(torch.uint8)
    _check_raw(cold, raw)
    shape = (targets.shape[0], cold.capacity)
    counts = check_ids("counts", counts, shape[:1], cold.capacity + 1, 1)
    targets = check_ids("targets", targets, shape[:1], raw.shape[0])
    if pages.shape != shape or slots.shape != shape:
        raise ValueError(f"pages and slots must be {shape}, got {tuple(pages.shape)} and {tuple(slots.shape)}")
    library = native.library() if pool.device.type == "cpu" and strides is not None else None
    if library is None or strides is None:
        pages, slots = _checked_places(pages, slots, counts, pool.shape[0], layout.block_size)
        keys, values = DealtPages(layout).gather(pool, pages.flatten(), slots.flatten())
        dense = (shape[0], cold.capacity, cold.head_size)
        raw[targets] = encode_pages(cold, keys.view(dense), values.view(dense), counts)
        return
    found = -1
    if {pages.dtype, slots.dtype} <= {torch.int32, torch.int64}:
        pages, slots = (part.to(torch.int64).contiguous() for part in (pages, slots))
        found = library.deltamem_check_cold_places(
            *map(native.int64, shape),
            *map(native.pointer, (pages, slots, counts)),
            *map(native.int64, (pool.shape[0], layout.block_size)),
            native.pointer(targets),
        )
    if found < 0:  # says what is wrong
        _checked_places(pages, slots, counts, pool.shape[0], layout.block_size)
        raise ValueError("pages or slots are outside the pool")
    in_place = found == 1
    out = kept_pages(raw, shape[0]) if in_place else raw
    places = torch.arange(shape[0]) if in_place else targets
    library.deltamem_encode_from(
        *_format_arguments(cold, pool.dtype, shape[0]),
        native.pointer(pool),
        native.int64(strides.page * pool.element_size()),
        strides.argument(),
        *map(native.pointer, (pages, slots, counts, places, out)),
        native.int64(out.stride(0)),
    )
    if in_place:
        in_words(raw).index_copy_(0, targets, in_words(out))


def in_words(raw: Tensor) -> Tensor:
    """Pages of bytes, eight of them in a number where that fits: they are moved one by one otherwise."""
    whole = raw.shape[1] % 8 == 0 and raw.stride(0) % 8 == 0 and raw.storage_offset() % 8 == 0
    return raw.view(torch.int64) if whole else raw


def _checked_places(
    pages: Tensor, slots: Tensor, counts: Tensor, num_pages: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Places within the pool, 0 past a page's tokens."""
    there = torch.arange(pages.shape[1], device=pages.device) < counts.unsqueeze(1)
    return check_places(pages.masked_fill(~there, 0), slots.masked_fill(~there, 0), num_pages, block_size)


def _format_arguments(cold: ColdFormat, dtype: torch.dtype, pages: int) -> tuple[object, ...]:
    sizes = (cold.head_size, cold.page_bytes)
    return cold.bits, *map(native.int64, sizes), native.DTYPE_CODES[dtype], native.int64(pages)


def _decoded(cold: ColdFormat, pages: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.empty(pages, cold.capacity, cold.head_size, dtype=dtype, device=device)
    return keys, torch.empty_like(keys), torch.empty(pages, dtype=torch.int64, device=device)


def _check_out(cold: ColdFormat, pages: int, dtype: torch.dtype, keys: Tensor, values: Tensor, counts: Tensor) -> None:
    shape = (pages, cold.capacity, cold.head_size)
    for name, part, wanted, kind in (
        ("keys", keys, shape, dtype),
        ("values", values, shape, dtype),
        ("counts", counts, shape[:1], torch.int64),
    ):
        if tuple(part.shape) != wanted or part.dtype != kind or not part.is_contiguous():
            raise ValueError(
                f"{name} to write to must be contiguous {wanted} {kind}, got {tuple(part.shape)} {part.dtype}"
            )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in native.DTYPE_CODES:
        raise ValueError(f"cold pages are read as float32, bfloat16 or float16, not {dtype}")


def _check_raw(cold: ColdFormat, raw: Tensor) -> None:
    if raw.dtype != torch.uint8 or raw.dim() != 2 or raw.shape[1] != cold.page_bytes or raw.stride(1) != 1:
        raise ValueError(
            f"the pool as bytes must be uint8 [num_pages, {cold.page_bytes}] with its bytes side by side, "
            f"got {raw.dtype} {tuple(raw.shape)} with strides {raw.stride()}"
        )
