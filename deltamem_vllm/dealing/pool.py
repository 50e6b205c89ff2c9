# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The KV memory of all layers as one array of equal pages.

A page is one kv head's ``block_size`` slots of one layer. vLLM keeps every layer's cache in one allocation, so a page
has one number, whichever layer it was made for, and attention can be pointed at any of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PagePool:
    """Numbers the pages of a KV cache.

    Parameters
    ----------
    caches: each layer's cache, ``[num_blocks, H_kv, block_size, 2 * D]``, model order; views of one allocation, with
        the two inner dimensions contiguous.

    Attributes
    ----------
    layers, heads, block_size, head_size: L, H_kv, slots of a page, D.
    pages: ``[num_pages, 1, block_size, 2 * D]``, the whole allocation.

    Raises
    ------
    ValueError: the caches do not form one array of equal pages.
    """

    def __init__(self, caches: Sequence[Tensor]) -> None:
        first = caches[0]
        blocks, heads, block_size, width = first.shape
        size = block_size * width
        for cache in caches:
            if cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                raise ValueError("the layers' KV caches do not share one allocation")
            if cache.shape != first.shape or cache.dtype != first.dtype:
                raise ValueError(
                    f"all layers need the same KV cache shape and dtype, found {tuple(first.shape)} {first.dtype} and "
                    f"{tuple(cache.shape)} {cache.dtype}"
                )
            offsets = (cache.stride(0), cache.stride(1), cache.storage_offset())
            if cache.stride()[2:] != (width, 1) or any(offset % size for offset in offsets):
                raise ValueError(
                    f"a page ({block_size} slots of {width} elements) must be contiguous and aligned to its size, "
                    f"found strides {cache.stride()} at offset {cache.storage_offset()}: not a head-major layout"
                )
        self.layers, self.heads, self.block_size, self.head_size = len(caches), heads, block_size, width // 2
        count = first.untyped_storage().nbytes() // first.element_size() // size
        self.pages = torch.as_strided(first, (count, 1, block_size, width), (size, size, width, 1), 0)
        bases = torch.tensor([cache.storage_offset() // size for cache in caches], device=first.device)
        head = torch.arange(heads, device=first.device) * (first.stride(1) // size)
        self._pair_base = (bases.unsqueeze(1) + head).to(torch.int32)  # [L, H]
        self._block_stride = first.stride(0) // size
        numbers = self.ids(torch.arange(blocks, device=first.device)).flatten()
        if not bool(numbers.sort().values.diff().all()):
            raise ValueError("the layers' KV caches overlap: two pages have the same memory")

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self.pages.device

    @property
    def flat(self) -> Tensor:
        """``[num_pages, block_size * 2 * D]``, the same memory."""
        return self.pages.view(self.pages.shape[0], -1)

    def ids(self, blocks: Tensor) -> Tensor:
        """Page numbers ``[L, H, b]`` int32 that blocks ``[b]`` give to each pair when nothing was dealt."""
        return self._pair_base.unsqueeze(-1) + blocks.to(torch.int32) * self._block_stride
