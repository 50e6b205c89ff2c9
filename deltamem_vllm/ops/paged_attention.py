# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention of decode steps and prefill chunks over hot and cold pages of any layer and head, on CPU.

Every (request, kv head) is a sequence with pages of its own. The work is in ``csrc/cpu/paged_attention*``; the slow,
obvious definition is in ``ops/reference_attention.py``.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops import paged_attention_torch
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.layout import PageLayout
from deltamem_vllm.ops.native import DTYPE_CODES, ISAS, library

MOST_DIM: Final = 256
MOST_GROUP: Final = 32
MOST_BLOCK: Final = 128
_STEP = 16  # heads and blocks are multiples of the widest vector

_FAULTS = {
    1: "has a length, a number of pages or a query start that does not fit the tables",
    2: "has a hot page outside the pool",
    3: "has a cold page outside the pool",
}
_NO_MEMORY = 4


# AttentionCall of csrc/cpu/paged_attention_types.h, field by field: all have eight bytes. Packed at once, for setting
# the fields of a ctypes structure one by one takes longer than reading a short sequence.
_CALL: Final = struct.Struct("@4P 2q P2q 2P P2qP 5q 6q 3q d 2q")


@dataclass(frozen=True)
class _Geometry:
    """What follows from pool and formats alone: checked and worked out once, not at every call.

    Attributes
    ----------
    hot, cold: what it was made for, held so that nothing else can take their place in memory.
    pool: pages, and bytes from one to the next.
    dim, block: D and slots of a hot page.
    strides: base, slot and dim of keys, then of values.
    code: bits (0: no cold pages), capacity, number of the dtype.
    """

    hot: PageLayout
    cold: ColdFormat | None
    pool: tuple[int, int]
    dim: int
    block: int
    strides: tuple[int, ...]
    code: tuple[int, int, int]


def paged_attention(
    query: Tensor,
    pool: Tensor,
    hot: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    output: Tensor,
    *,
    cold_format: ColdFormat | None = None,
    cold_table: Tensor | None = None,
    cold_pages: Tensor | None = None,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    lse: Tensor | None = None,
    isa: str | None = None,
    threads: int = 0,
) -> None:
    """Write ``softmax(scale * q.k) v`` of every query row to ``output``.

    Query i of a sequence's n sees all cold tokens and the first ``seq_lens - n + i + 1`` hot ones. A row that sees
    nothing becomes zeros. The same call with the same threads gives the same bits.

    Parameters
    ----------
    query: ``[T, G, D]`` in the pool's dtype: G query heads share a kv head; contiguous.
    pool: ``[num_pages, block_size * 2 * D]`` float32, float16 or bfloat16, elements of a page side by side.
    hot: where a token stands in a hot page; slots and dims at fixed distances.
    block_table: ``[S, W]`` int32, page numbers of hot tokens in order; entries past a sequence's tokens are not read.
    seq_lens: ``[S]`` int32, tokens in hot pages, those of this step included.
    query_start_loc: ``[S + 1]`` int32, first row of every sequence; sequences may have none.
    scale: factor on q.k.
    output: ``[T, G, D]``, written; the rows of the sequences only.
    cold_format: of cold pages; None if there are none.
    cold_table: ``[S, Wc]`` int32, page numbers of cold pages.
    cold_pages: ``[S]`` int32, how many of them are used.
    max_query_len, max_seq_len: for kernels that must be told; not needed here.
    lse: ``[T, G]`` float32, written if given: log of the sum of ``exp(scale * q.k)``, -inf for a row of zeros.
    isa: use no more than this one of `native.ISAS`; None: what `native.isa` says.
    threads: to split the work over; 0: what OpenMP is set to.

    Raises
    ------
    ValueError: a shape, dtype, layout, page number or length does not fit.
    MemoryError: no room for the partial results.
    """
    geometry = _geometry(pool, hot, cold_format)
    sequences = len(seq_lens)
    _check_rows(geometry, pool.dtype, query, output, lse)
    _check_table("block_table", block_table, sequences, 2)
    _check_table("seq_lens", seq_lens, sequences, 1)
    _check_table("query_start_loc", query_start_loc, sequences + 1, 1)
    if cold_format is not None or cold_table is not None or cold_pages is not None:
        if cold_format is None or cold_table is None or cold_pages is None:
            raise ValueError("cold_format, cold_table and cold_pages belong together: give all or none")
        _check_table("cold_table", cold_table, sequences, 2)
        _check_table("cold_pages", cold_pages, sequences, 1)
    if isa is not None and isa not in ISAS:
        raise ValueError(f"isa must be one of {', '.join(ISAS)}, got {isa!r}")
    native = library()
    if native is None:
        paged_attention_torch.attend(
            query, pool, DealtPages(hot), block_table, seq_lens, query_start_loc, scale, output, cold_format,
            cold_table, cold_pages, lse,
        )  # fmt: skip
        return
    cold = (0, 0, 0, 0)
    if cold_table is not None and cold_pages is not None:
        cold = (cold_table.data_ptr(), cold_table.stride(0), cold_table.shape[1], cold_pages.data_ptr())
    tokens, group, _ = query.shape
    call = _CALL.pack(
        query.data_ptr(), output.data_ptr(), 0 if lse is None else lse.data_ptr(), pool.data_ptr(), *geometry.pool,
        block_table.data_ptr(), block_table.stride(0), block_table.shape[1], seq_lens.data_ptr(),
        query_start_loc.data_ptr(), *cold, sequences, tokens, group, geometry.dim, geometry.block, *geometry.strides,
        *geometry.code, scale, -1 if isa is None else ISAS.index(isa), threads,
    )  # fmt: skip
    where = ctypes.c_int64()
    fault = native.deltamem_paged_attention(call, ctypes.byref(where))
    if fault:
        _raise(fault, where.value, pool.shape[0], block_table, seq_lens, cold_pages)


def _raise(
    fault: int, sequence: int, num_pages: int, block_table: Tensor, seq_lens: Tensor, cold_pages: Tensor | None
) -> None:
    if fault == _NO_MEMORY:
        raise MemoryError("no memory for the partial results of attention; use fewer threads or a smaller batch")
    cold = 0 if cold_pages is None else int(cold_pages[sequence])
    raise ValueError(
        f"sequence {sequence} {_FAULTS[fault]}: {int(seq_lens[sequence])} hot tokens in a table of "
        f"{block_table.shape[1]} pages, {cold} cold pages, a pool of {num_pages} pages"
    )


_GEOMETRIES: dict[tuple[object, ...], _Geometry] = {}


def _geometry(pool: Tensor, hot: PageLayout, cold: ColdFormat | None) -> _Geometry:
    """The checked geometry of a pool. Formats are known by their identity: comparing tensors takes long."""
    key = (id(hot), id(cold), pool.dtype, pool.shape, pool.stride(), pool.is_cpu)
    known = _GEOMETRIES.get(key)
    if known is None:
        known = _checked_geometry(pool, hot, cold)
        if len(_GEOMETRIES) >= 64:  # only tests make many
            _GEOMETRIES.clear()
        _GEOMETRIES[key] = known
    return known


def _checked_geometry(pool: Tensor, hot: PageLayout, cold: ColdFormat | None) -> _Geometry:
    dim, size = hot.head_size, hot.block_size
    if not pool.is_cpu:
        raise ValueError("paged_attention of ops/ works on CPU tensors; for others use triton_kernels")
    if dim % _STEP or not 0 < dim <= MOST_DIM or size % _STEP or not 0 < size <= MOST_BLOCK:
        raise ValueError(
            f"heads need a multiple of {_STEP} up to {MOST_DIM} dims and blocks one up to {MOST_BLOCK} slots, "
            f"got {dim} and {size}"
        )
    if pool.dtype not in DTYPE_CODES:
        raise ValueError(f"the pool must have one dtype of {', '.join(map(str, DTYPE_CODES))}, got {pool.dtype}")
    if pool.dim() != 2 or pool.shape[1] != size * 2 * dim or pool.stride(1) != 1:
        raise ValueError(
            f"the pool must be [pages, {size * 2 * dim}] with its elements side by side, "
            f"got {tuple(pool.shape)} with strides {pool.stride()}"
        )
    page_bytes = pool.shape[1] * pool.element_size()
    if cold is not None and (cold.head_size != dim or cold.page_bytes != page_bytes):
        raise ValueError(
            f"cold pages must have {dim} dims and {page_bytes} bytes, got {cold.head_size} and {cold.page_bytes}"
        )
    strides: list[int] = []
    for part in ("keys", "values"):
        own = hot.strides(part)
        if own is None:
            raise ValueError(
                f"{part} of hot pages must stand at fixed distances (slot by slot and dim by dim); this layout, such "
                "as that of AMX tiles, is not supported: use a KV cache layout without tiles"
            )
        strides += own
    code = (0, 0) if cold is None else (cold.bits, cold.capacity)
    pages = (pool.shape[0], pool.stride(0) * pool.element_size())
    return _Geometry(hot, cold, pages, dim, size, tuple(strides), (*code, DTYPE_CODES[pool.dtype]))


def _check_rows(geometry: _Geometry, dtype: torch.dtype, query: Tensor, output: Tensor, lse: Tensor | None) -> None:
    if query.dtype is not dtype or output.dtype is not dtype:
        raise ValueError(
            f"pool, query and output must have one dtype of {', '.join(map(str, DTYPE_CODES))}, "
            f"got {dtype}, {query.dtype} and {output.dtype}"
        )
    shape = query.shape
    if len(shape) != 3 or shape[2] != geometry.dim or not 1 <= shape[1] <= MOST_GROUP:
        raise ValueError(f"query must be [tokens, 1 to {MOST_GROUP} heads, {geometry.dim}], got {tuple(shape)}")
    if output.shape != shape or not query.is_contiguous() or not output.is_contiguous():
        raise ValueError(
            f"query and output must be contiguous and of one shape, got {tuple(shape)} with strides "
            f"{query.stride()} and {tuple(output.shape)} with strides {output.stride()}"
        )
    if lse is not None and (lse.shape != shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"lse must be contiguous float32 {tuple(shape[:2])}, got {lse.dtype} {tuple(lse.shape)}")
    if not (query.is_cpu and output.is_cpu and (lse is None or lse.is_cpu)):
        raise ValueError("query, output and lse must be on the CPU, as the pool is")


def _check_table(name: str, table: Tensor, rows: int, dims: int) -> None:
    shape = table.shape
    if table.dtype is not torch.int32 or len(shape) != dims or shape[0] != rows or not table.is_cpu:
        raise ValueError(
            f"{name} must be int32 with {dims} dimension(s) and {rows} rows on the CPU, got {table.dtype} "
            f"{tuple(shape)} on {table.device}"
        )
    if not table.is_contiguous() and table.stride(-1) != 1:
        raise ValueError(f"{name} must have its last dimension side by side, got strides {table.stride()}")
