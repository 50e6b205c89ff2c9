# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Our own attention in a worker: what makes cold pages, and the kernel that reads them together with hot ones."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deltamem_vllm.codec.cold_page import LOSS, ColdFormat
from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.dealing.cold_tier import ColdTier
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.integration.cold_support import HEAD_STEP, MOST_DIM
from deltamem_vllm.integration.dealt_batch import DealtRead
from deltamem_vllm.ops import native
from deltamem_vllm.ops.layout import PageLayout


class PagedAttention:
    """Attention of one layer's dealt rows over their hot and cold pages.

    Parameters
    ----------
    cold: layout of cold pages; None if no page can be cold.
    hot: layout of hot pages.
    pool: the pages.
    scale: factor on q . k.
    always: read batches without a cold page, too.
    """

    def __init__(self, cold: ColdFormat | None, hot: PageLayout, pool: PagePool, scale: float, always: bool) -> None:
        self._cold = cold
        self._hot = hot
        self._pool = pool.flat
        self._scale = scale
        self._always = always
        # Imported where needed: Triton is no part of a CPU installation, and asks for a GPU when it is imported.
        module = "ops.paged_attention" if pool.device.type == "cpu" else "triton_kernels.attention"
        self._attend = importlib.import_module(f"deltamem_vllm.{module}").paged_attention

    def wants(self, read: DealtRead) -> bool:
        """Whether it reads this step, and not the backend's kernel."""
        return self._always or read.cold is not None

    def __call__(self, read: DealtRead, layer: int, queries: Tensor, output: Tensor) -> None:
        """Write the attention of ``queries`` ``[T, G, D]``, sequence after sequence, to ``output``."""
        table, seq_lens, *cold = read.layer(layer)
        cold_table, cold_pages = cold or (None, None)
        self._attend(
            queries.contiguous(),
            self._pool,
            self._hot,
            table,
            seq_lens,
            read.query_start_loc,
            self._scale,
            output,
            cold_format=None if cold_table is None else self._cold,
            cold_table=cold_table,
            cold_pages=cold_pages,
            max_query_len=read.max_query_len,
            max_seq_len=read.max_seq_len,
        )


def cold_tier(config: DeltaMemConfig, pool: PagePool, hot: PageLayout) -> ColdTier | None:
    """What makes cold pages; None if the configuration wants none.

    Raises
    ------
    ValueError: cold pages would hold no more tokens than hot ones.
    """
    bits = config.cold_bits
    if isinstance(bits, str) or not bits:
        return None
    layout = ColdFormat(bits, pool.head_size, pool.flat.shape[1] * pool.flat.element_size())
    if layout.capacity <= pool.block_size:
        raise ValueError(
            f"a cold page of {bits} bits holds {layout.capacity} tokens of {pool.head_size} dimensions, a "
            f"hot page {pool.block_size}: nothing is saved. Use larger blocks (--block-size), fewer bits "
            "(--deltamem-config.cold_bits), or none (0)."
        )
    loss = LOSS[bits] if config.cold_loss is None else config.cold_loss
    return ColdTier(layout, loss, pool, hot)


def install_kernel(layers: Sequence[Any], cold: ColdFormat | None, hot: PageLayout, pool: PagePool) -> None:
    """Give every attention layer the kernel that reads dealt rows, where it is needed or faster than the backend's.

    Raises
    ------
    ValueError: pages can be cold, and a layer's attention has a part that the kernel does not know.
    """
    # Two to three times as fast as vLLM's kernel on a CPU (benchmarks/attention_cpu.py); not timed on a GPU.
    always = pool.device.type == "cpu" and native.available() and _is_readable(hot)
    if cold is None and not always:
        return
    for layer in layers:
        found = _unknown(layer.impl)
        if found and cold is not None:
            raise ValueError(
                f"cold pages cannot be read by attention with {', '.join(found)}; supported: attention without them. "
                "Set --deltamem-config.cold_bits 0."
            )
        if not found:
            layer.impl.deltamem_kernel = PagedAttention(cold, hot, pool, float(layer.impl.scale), always)


def _is_readable(hot: PageLayout) -> bool:
    affine = hot.strides("keys") is not None and hot.strides("values") is not None
    return affine and hot.head_size % HEAD_STEP == 0 and hot.head_size <= MOST_DIM


def _unknown(impl: Any) -> list[str]:
    """Parts of a layer's attention that our kernels do not know."""
    parts = {
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "a soft cap on logits": bool(getattr(impl, "logits_soft_cap", None)),
        "a sliding window": getattr(impl, "sliding_window", None) not in (None, -1, (-1, -1)),
    }
    return [name for name, there in parts.items() if there]
