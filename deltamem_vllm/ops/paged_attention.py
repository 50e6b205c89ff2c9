# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention of decode steps and prefill chunks over hot and cold pages of any layer and head, on CPU.

Every (request, kv head) is a sequence with pages of its own. The work is in ``csrc/cpu/paged_attention*``; the slow,
obvious definition is in ``ops/reference_attention.py``.
"""

from __future__ import annotations

import ctypes
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

_POINTERS = ("query", "output", "lse", "pool")
_FAULTS = {
    1: "has a length, a number of pages or a query start that does not fit the tables",
    2: "has a hot page outside the pool",
    3: "has a cold page outside the pool",
}
_NO_MEMORY = 4


class _Call(ctypes.Structure):
    """AttentionCall of csrc/cpu/paged_attention_types.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("num_pages", ctypes.c_int64),
        ("page_stride_bytes", ctypes.c_int64),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("block_table_width", ctypes.c_int64),
        ("seq_lens", ctypes.c_void_p),
        ("query_start_loc", ctypes.c_void_p),
        ("cold_table", ctypes.c_void_p),
        ("cold_table_stride", ctypes.c_int64),
        ("cold_table_width", ctypes.c_int64),
        ("cold_pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sequences", "tokens", "group", "dim", "block_size")),
        *((name, ctypes.c_int64) for name in ("key_base", "key_slot", "key_dim")),
        *((name, ctypes.c_int64) for name in ("value_base", "value_slot", "value_dim")),
        *((name, ctypes.c_int64) for name in ("bits", "capacity", "dtype")),
        ("scale", ctypes.c_double),
        ("isa", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    ]


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
    _check(query, pool, hot, block_table, seq_lens, query_start_loc, output, lse)
    _check_cold(pool, hot, len(seq_lens), cold_format, cold_table, cold_pages)
    if isa is not None and isa not in ISAS:
        raise ValueError(f"isa must be one of {', '.join(ISAS)}, got {isa!r}")
    native = library()
    if native is None:
        if lse is not None:
            raise ValueError("the log of the sum needs deltamem's native library; build it with `make native`")
        paged_attention_torch.attend(
            query, pool, DealtPages(hot), block_table, seq_lens, query_start_loc, scale, output, cold_format,
            cold_table, cold_pages,
        )  # fmt: skip
        return
    call = _Call()
    call.query, call.output, call.pool = query.data_ptr(), output.data_ptr(), pool.data_ptr()
    call.lse = None if lse is None else lse.data_ptr()
    call.num_pages, call.page_stride_bytes = pool.shape[0], pool.stride(0) * pool.element_size()
    call.block_table, call.block_table_stride = block_table.data_ptr(), block_table.stride(0)
    call.block_table_width = block_table.shape[1]
    call.seq_lens, call.query_start_loc = seq_lens.data_ptr(), query_start_loc.data_ptr()
    call.sequences, call.block_size = len(seq_lens), hot.block_size
    call.tokens, call.group, call.dim = query.shape
    call.key_base, call.key_slot, call.key_dim = _strides(hot, "keys")
    call.value_base, call.value_slot, call.value_dim = _strides(hot, "values")
    if cold_format is not None and cold_table is not None and cold_pages is not None:
        call.cold_table, call.cold_table_stride = cold_table.data_ptr(), cold_table.stride(0)
        call.cold_table_width, call.cold_pages = cold_table.shape[1], cold_pages.data_ptr()
        call.bits, call.capacity = cold_format.bits, cold_format.capacity
    call.dtype, call.scale, call.threads = DTYPE_CODES[query.dtype], scale, threads
    call.isa = -1 if isa is None else ISAS.index(isa)
    where = ctypes.c_int64()
    fault = native.deltamem_paged_attention(ctypes.byref(call), ctypes.byref(where))
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


_STRIDES: dict[tuple[int, str], tuple[PageLayout, tuple[int, int, int]]] = {}


def _strides(hot: PageLayout, part: str) -> tuple[int, int, int]:
    """`PageLayout.strides`, which compares every offset, once for a layout and not at every call."""
    known = _STRIDES.get((id(hot), part))
    if known is not None and known[0] is hot:
        return known[1]
    strides = hot.strides(part)
    if strides is None:
        raise ValueError(
            f"{part} of hot pages must stand at fixed distances (slot by slot and dim by dim); this layout, such as "
            "that of AMX tiles, is not supported: use a KV cache layout without tiles"
        )
    if len(_STRIDES) > 64:  # Only tests make many layouts.
        _STRIDES.clear()
    _STRIDES[id(hot), part] = (hot, strides)
    return strides


def _check(
    query: Tensor, pool: Tensor, hot: PageLayout, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor,
    output: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    dim, size = hot.head_size, hot.block_size
    if dim % _STEP or not 0 < dim <= MOST_DIM or size % _STEP or not 0 < size <= MOST_BLOCK:
        raise ValueError(
            f"heads need a multiple of {_STEP} up to {MOST_DIM} dims and blocks one up to {MOST_BLOCK} slots, "
            f"got {dim} and {size}"
        )
    if pool.dtype not in DTYPE_CODES or query.dtype != pool.dtype or output.dtype != pool.dtype:
        raise ValueError(
            f"pool, query and output must have one dtype of {', '.join(map(str, DTYPE_CODES))}, "
            f"got {pool.dtype}, {query.dtype} and {output.dtype}"
        )
    if pool.dim() != 2 or pool.shape[1] != size * 2 * dim or pool.stride(1) != 1:
        raise ValueError(
            f"the pool must be [pages, {size * 2 * dim}] with its elements side by side, "
            f"got {tuple(pool.shape)} with strides {pool.stride()}"
        )
    if query.dim() != 3 or query.shape[2] != dim or not 1 <= query.shape[1] <= MOST_GROUP:
        raise ValueError(f"query must be [tokens, 1 to {MOST_GROUP} heads, {dim}], got {tuple(query.shape)}")
    if output.shape != query.shape or not query.is_contiguous() or not output.is_contiguous():
        raise ValueError(
            f"query and output must be contiguous and of one shape, got {tuple(query.shape)} with strides "
            f"{query.stride()} and {tuple(output.shape)} with strides {output.stride()}"
        )
    if lse is not None and (lse.shape != query.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"lse must be contiguous float32 {tuple(query.shape[:2])}, got {lse.dtype} {tuple(lse.shape)}")
    sequences = seq_lens.shape[0]
    _check_table("block_table", block_table, sequences, 2)
    _check_table("seq_lens", seq_lens, sequences, 1)
    _check_table("query_start_loc", query_start_loc, sequences + 1, 1)
    if any(t.device.type != "cpu" for t in (query, pool, output, block_table, seq_lens, query_start_loc)):
        raise ValueError("paged_attention of ops/ works on CPU tensors; for others use triton_kernels")


def _check_cold(
    pool: Tensor, hot: PageLayout, sequences: int, cold_format: ColdFormat | None, cold_table: Tensor | None,
    cold_pages: Tensor | None,
) -> None:  # fmt: skip
    if cold_format is None and cold_table is None and cold_pages is None:
        return
    if cold_format is None or cold_table is None or cold_pages is None:
        raise ValueError("cold_format, cold_table and cold_pages belong together: give all or none")
    page_bytes = pool.shape[1] * pool.element_size()
    if cold_format.head_size != hot.head_size or cold_format.page_bytes != page_bytes:
        raise ValueError(
            f"cold pages must have {hot.head_size} dims and {page_bytes} bytes, "
            f"got {cold_format.head_size} and {cold_format.page_bytes}"
        )
    _check_table("cold_table", cold_table, sequences, 2)
    _check_table("cold_pages", cold_pages, sequences, 1)


def _check_table(name: str, table: Tensor, rows: int, dims: int) -> None:
    if table.dtype != torch.int32 or table.dim() != dims or table.shape[0] != rows:
        raise ValueError(
            f"{name} must be int32 with {dims} dimension(s) and {rows} rows, got {table.dtype} {tuple(table.shape)}"
        )
    if table.numel() and table.stride(-1) != 1:
        raise ValueError(f"{name} must have its last dimension side by side, got strides {table.stride()}")
