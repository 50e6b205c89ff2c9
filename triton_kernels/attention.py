# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention over hot and cold pages on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.layout import PageLayout
from deltamem_vllm.triton_kernels import settings
from deltamem_vllm.triton_kernels.attend_pages import attend_pages
from deltamem_vllm.triton_kernels.checks import check_pool, check_table
from deltamem_vllm.triton_kernels.merge_splits import merge_splits

_LOG2_E = 1.4426950408889634


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
    splits: int | None = None,
) -> None:
    """Write ``softmax(scale * q.k) v`` of every query row to ``output``: `ops.paged_attention` for a GPU.

    Never waits for the device, and what it launches depends on shapes and host numbers only: it may be captured into a
    CUDA graph. Query i of a sequence's n reads all its cold tokens and its first ``seq_lens - n + i + 1`` hot ones. A
    row that reads nothing becomes zeros. Numbers in the tables that are of no page, and counts that do not fit, are cut
    to what fits: the result is then wrong, but nothing outside the pool is read.

    Parameters
    ----------
    query: ``[T, G, D]`` in the pool's dtype: G query heads share a kv head; the elements of a head side by side.
    pool: ``[num_pages, block_size * 2 * D]`` float32, float16 or bfloat16, elements of a page side by side.
    hot: where a token stands in a hot page; slots and dims at fixed distances.
    block_table: ``[S, W]`` int32, page numbers of hot tokens in order; entries past a sequence's tokens do not matter.
    seq_lens: ``[S]`` int32, tokens in hot pages, those of this step included.
    query_start_loc: ``[S + 1]`` int32, first row of every sequence, never decreasing; sequences may have none.
    scale: factor on q.k.
    output: ``[T, G, D]`` contiguous, written; the rows of the sequences only.
    cold_format: of cold pages; None if there are none.
    cold_table: ``[S, Wc]`` int32, page numbers of cold pages.
    cold_pages: ``[S]`` int32, how many of them are used.
    max_query_len: the most rows of a sequence, T where None. Rows past it are not computed: it has to be true.
    max_seq_len: the most hot tokens of a sequence, what the table has room for where None; decides only into how many
        parts the work is cut.
    lse: ``[T, G]`` float32, written if given: log of the sum of ``exp(scale * q.k)``, -inf for a row of zeros.
    splits: parts in which each sequence's pages are read at the same time; None: as many as fill the device.

    Raises
    ------
    ValueError: a shape, dtype or layout does not fit.
    """
    _check(query, pool, hot, block_table, seq_lens, query_start_loc, output, lse)
    cold_width = _check_cold(pool, hot, seq_lens.shape[0], cold_format, cold_table, cold_pages)
    rows, group, dim = query.shape
    sequences, width = block_table.shape
    longest = rows if max_query_len is None else max_query_len
    if rows == 0 or sequences == 0 or longest == 0:
        return
    if lse is None:
        lse = torch.empty(rows, group, dtype=torch.float32, device=query.device)

    tiling = settings.attention_tiling(dim, query.element_size(), group, longest, cold_format)
    tiles = -(-longest // (tiling.rows // group))
    hot_tokens = width * hot.block_size if max_seq_len is None else min(max_seq_len, width * hot.block_size)
    cold_tokens = cold_width * (cold_format.capacity if cold_format else 0)
    most = settings.most_splits(hot_tokens, cold_tokens, tiling, rows * group * dim)
    if splits is None:
        splits = min(most, settings.wanted_splits(query.device, sequences * tiles))
    elif not 1 <= splits <= settings.MOST_SPLITS:
        raise ValueError(f"splits must be 1 to {settings.MOST_SPLITS}, got {splits}")
    direct = splits == 1
    partial, partial_lse = output, lse
    if not direct:
        partial = torch.empty(rows, group, splits, dim, dtype=torch.float32, device=query.device)
        partial_lse = torch.empty(rows, group, splits, dtype=torch.float32, device=query.device)
    attend_pages[sequences, tiles, splits](
        query,
        pool,
        pool.view(torch.uint8),
        block_table,
        seq_lens,
        block_table if cold_table is None else cold_table,
        seq_lens if cold_pages is None else cold_pages,
        query_start_loc,
        partial,
        partial_lse,
        scale * _LOG2_E,
        pool.shape[0],
        rows,
        splits,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        width,
        0 if cold_table is None else cold_table.stride(0),
        cold_width,
        **settings.attention_constants(hot, group, pool, cold_format, tiling),
        DIRECT=direct,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=True,
    )
    if not direct:
        merge_splits[(rows * group,)](
            partial,
            partial_lse,
            query_start_loc,
            output,
            lse,
            sequences,
            splits,
            G=group,
            D=dim,
            D_PADDED=settings.padded(dim),
            CHUNK=settings.MERGE_CHUNK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _check(
    query: Tensor,
    pool: Tensor,
    hot: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    output: Tensor,
    lse: Tensor | None,
) -> None:
    check_pool(pool, hot, settings.DTYPES)
    dim, step = hot.head_size, settings.HEAD_STEP
    if dim % step or not 0 < dim <= settings.MOST_DIM:
        raise ValueError(f"heads need a multiple of {step} dims up to {settings.MOST_DIM}, got {dim}")
    if query.dim() != 3 or query.shape[2] != dim or not 1 <= query.shape[1] <= settings.MOST_GROUP:
        raise ValueError(f"query must be [tokens, 1 to {settings.MOST_GROUP} heads, {dim}], got {tuple(query.shape)}")
    if query.dtype != pool.dtype or output.dtype != pool.dtype:
        raise ValueError(f"query and output must be {pool.dtype} like the pool, got {query.dtype} and {output.dtype}")
    if output.shape != query.shape or query.stride(2) != 1 or not output.is_contiguous():
        raise ValueError(
            f"output must be contiguous and of the shape of query, {tuple(query.shape)}, and the elements of a query "
            f"side by side; got {tuple(output.shape)} with strides {output.stride()} and {query.stride()}"
        )
    if lse is not None and (lse.shape != query.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()):
        raise ValueError(f"lse must be contiguous float32 {tuple(query.shape[:2])}, got {lse.dtype} {tuple(lse.shape)}")
    sequences = seq_lens.shape[0]
    check_table("block_table", block_table, sequences, 2)
    check_table("seq_lens", seq_lens, sequences, 1)
    check_table("query_start_loc", query_start_loc, sequences + 1, 1)


def _check_cold(
    pool: Tensor,
    hot: PageLayout,
    sequences: int,
    cold_format: ColdFormat | None,
    cold_table: Tensor | None,
    cold_pages: Tensor | None,
) -> int:
    """Width of the table of cold pages, 0 without any."""
    if cold_format is None and cold_table is None and cold_pages is None:
        return 0
    if cold_format is None or cold_table is None or cold_pages is None:
        raise ValueError("cold_format, cold_table and cold_pages belong together: give all or none")
    page_bytes = pool.shape[1] * pool.element_size()
    if cold_format.head_size != hot.head_size or cold_format.page_bytes != page_bytes:
        raise ValueError(
            f"cold pages must have {hot.head_size} dims and {page_bytes} bytes, "
            f"got {cold_format.head_size} and {cold_format.page_bytes}"
        )
    check_table("cold_table", cold_table, sequences, 2)
    check_table("cold_pages", cold_pages, sequences, 1)
    return cold_table.shape[1]
