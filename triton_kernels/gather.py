# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Move tokens between pages of the pool on a GPU: what a compaction does with the survivors."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import PageLayout
from deltamem_vllm.triton_kernels import settings
from deltamem_vllm.triton_kernels.checks import check_numbers, check_pool
from deltamem_vllm.triton_kernels.copy_tokens import copy_tokens

_TILE = 4096  # elements that one program moves of the keys, and as many of the values
_BITS_OF = {2: torch.int16, 4: torch.int32}


def gather_pages(pool: Tensor, layout: PageLayout, page: Tensor, slot: Tensor, targets: Tensor) -> None:
    """Fill pages with tokens from anywhere in the pool, bit by bit.

    Tokens pass through a copy, so that pages may be filled that tokens still stand in. Never waits for the device.

    Parameters
    ----------
    pool: ``[NP, block_size * 2 * D]`` bfloat16, float16 or float32; modified.
    layout: of the pages; any whose offsets are affine in slot and dim.
    page, slot: ``[n * block_size]`` int32 or int64, where each token stands. Numbers of no page or slot are cut to one.
    targets: ``[n]`` int32 or int64, distinct pages, each filled by the next block_size tokens. Numbers of no page are
        left out.

    Raises
    ------
    ValueError: a shape, dtype or layout is none of the above.
    """
    check_pool(pool, layout, settings.DTYPES)
    count = targets.numel() * layout.block_size
    check_numbers("targets", targets, targets.numel())
    check_numbers("page", page, count)
    check_numbers("slot", slot, count)
    if not count:
        return
    bits = pool.view(_BITS_OF[pool.element_size()])
    rows = torch.empty(count, 2 * layout.head_size, dtype=bits.dtype, device=pool.device)
    tokens = max(1, _TILE // settings.padded(layout.head_size))
    for fill in (False, True):
        copy_tokens[(-(-count // tokens),)](
            bits,
            rows,
            targets if fill else page,
            slot,
            count,
            pool.shape[0],
            **settings.page_constants(layout),
            PAGE_STRIDE=pool.stride(0),
            TOKENS=tokens,
            FILL=fill,
            num_warps=4,
            enable_fp_fusion=True,
        )
