# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention over dealt pages, with the backend's own kernel in its own forward().

The kernel is shown a model with one kv head: every (request, kv head) is a sequence, every page of the pool a block.
A copy of the layer's implementation that believes in one kv head makes that call; nothing of vLLM's is rewritten.

Where some of the pages are cold, a kernel of our own reads the batch's dealt rows, hot pages and cold ones in one pass.
On a CPU it reads all dealt rows: it is faster than the backend's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs

from deltamem_vllm.integration.dealt_batch import DealtRead, StockRows
from deltamem_vllm.integration.paged_attention import PagedAttention


class ReadsDealtPages:
    """Mixed in before an attention implementation: reads a step's dealt rows through their page tables.

    Attributes
    ----------
    deltamem_layer: index of this layer's tables; None until the worker installs it.
    deltamem_kernel: reads hot and cold pages; None where the backend's own kernel reads all there is.
    """

    deltamem_layer: int | None = None
    deltamem_kernel: PagedAttention | None = None
    _pair_impl: Any = None

    def install_page_tables(self, layer_index: int) -> None:
        """Called once by the worker."""
        self.deltamem_layer = layer_index
        pair = copy.copy(self)
        pair.num_heads = self.num_heads // self.num_kv_heads  # type: ignore[attr-defined]
        pair.num_kv_heads = 1  # type: ignore[attr-defined]
        self._pair_impl = pair

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        read: DealtRead | None = getattr(attn_metadata, "deltamem_dealt", None)
        if read is None or self.deltamem_layer is None:
            stock: Tensor = super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
            return stock
        if read.stock is not None:
            self._forward_stock_rows(read.stock, layer, query, key, value, kv_cache, attn_metadata, output)
        self._forward_dealt(read, layer, query, key, value, attn_metadata, output)
        return output

    def _forward_dealt(
        self, read: DealtRead, layer: Any, query: Tensor, key: Tensor, value: Tensor, metadata: Any, output: Tensor
    ) -> None:
        pair = self._pair_impl
        count = metadata.num_actual_tokens * self.num_kv_heads  # type: ignore[attr-defined]
        queries = query.reshape(-1, pair.num_heads, query.shape[-1])[:count]
        outputs = output.view(-1, pair.num_heads, output.shape[-1])[:count]
        if read.order is not None:
            queries = queries.index_select(0, read.order)
        target = outputs if read.order is None else torch.empty_like(queries)
        assert self.deltamem_layer is not None, "checked by the caller"
        if self.deltamem_kernel is not None and self.deltamem_kernel.wants(read):
            self.deltamem_kernel(read, self.deltamem_layer, queries, target)
        else:
            assert read.cold is None, "the worker installs a kernel where pages can be cold"
            metadata = _METADATA[self._backend](pair, layer, read, self.deltamem_layer, metadata, queries)
            super(ReadsDealtPages, pair).forward(  # type: ignore[misc]
                layer, queries, key, value, read.pages, metadata, target
            )
        if read.order is not None:
            outputs.index_copy_(0, read.order, target)

    def _forward_stock_rows(
        self, rows: StockRows, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, metadata: Any,
        output: Tensor,
    ) -> None:  # fmt: skip
        if rows.metadata is None:
            rows.metadata = _stock_rows_metadata(self, layer, rows, metadata, query.dtype)
        if isinstance(rows.tokens, slice):
            queries, target = query[rows.tokens], output[rows.tokens]
        else:
            queries = query.index_select(0, rows.tokens)
            target = torch.empty_like(output[: len(rows.tokens)])
        super().forward(layer, queries, key, value, kv_cache, rows.metadata, target)  # type: ignore[misc]
        if not isinstance(rows.tokens, slice):
            output.index_copy_(0, rows.tokens, target)

    @property
    def _backend(self) -> str:
        return type(self).deltamem_backend  # type: ignore[attr-defined,no-any-return]


def _pair_fields(read: DealtRead, layer_index: int, queries: Tensor) -> dict[str, Any]:
    """What every backend's metadata says about the sequences of one layer."""
    table, seq_lens = read.layer(layer_index)[:2]
    return {
        "num_actual_tokens": queries.shape[0],
        "max_query_len": read.max_query_len,
        "query_start_loc": read.query_start_loc,
        "max_seq_len": read.max_seq_len,
        "seq_lens": seq_lens,
        "block_table": table,
    }


def _cpu(pair: Any, layer: Any, read: DealtRead, layer_index: int, metadata: Any, queries: Tensor) -> Any:
    fields = _pair_fields(read, layer_index, queries)
    split = _cpu_work_split(pair, layer, fields["seq_lens"], fields["query_start_loc"], queries.dtype)
    return replace(metadata, **fields, scheduler_metadata=split)


def _cpu_work_split(impl: Any, layer: Any, seq_lens: Tensor, query_start_loc: Tensor, dtype: torch.dtype) -> Tensor:
    return ops.cpu_attn_get_scheduler_metadata(
        num_reqs=seq_lens.shape[0],
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        head_dim=impl.head_size,
        seq_lens=seq_lens,
        dtype=dtype,
        query_start_loc=query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=layer.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=impl.kv_cache_dtype,
    )


def _flash(pair: Any, layer: Any, read: DealtRead, layer_index: int, metadata: Any, queries: Tensor) -> Any:
    # Ahead-of-time scheduling was computed for other sequences; without it the kernel schedules itself.
    return replace(metadata, **_pair_fields(read, layer_index, queries), scheduler_metadata=None, max_num_splits=0)


def _triton(pair: Any, layer: Any, read: DealtRead, layer_index: int, metadata: Any, queries: Tensor) -> Any:
    # The scratch memory of the split-KV kernel is sized for vLLM's own batch; heads as sequences fill a GPU without it.
    return replace(metadata, **_pair_fields(read, layer_index, queries), seq_threshold_3D=None)


_METADATA: dict[str, Callable[..., Any]] = {"CPU_ATTN": _cpu, "FLASH_ATTN": _flash, "TRITON_ATTN": _triton}
"""Backends that can read dealt pages, and how each one's metadata is told of it."""

READERS = tuple(_METADATA)


def _stock_rows_metadata(impl: Any, layer: Any, rows: StockRows, metadata: Any, dtype: torch.dtype) -> Any:
    """The metadata of some rows of a batch: vLLM's, cut down (CPU backend only: graphs read all rows as dealt)."""
    seq_lens = metadata.seq_lens.index_select(0, rows.rows)
    return replace(
        metadata,
        num_actual_tokens=int(rows.query_start_loc[-1]),
        max_query_len=rows.max_query_len,
        query_start_loc=rows.query_start_loc,
        seq_lens=seq_lens,
        block_table=metadata.block_table.index_select(0, rows.rows),
        scheduler_metadata=_cpu_work_split(impl, layer, seq_lens, rows.query_start_loc, dtype),
    )
