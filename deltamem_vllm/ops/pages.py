# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Read the resident tokens of a request out of its pages, and write survivors into pages.

Plain torch: no data-dependent shapes and no host synchronisation, so the same code runs on CPU and GPU. The slow,
obvious definition is in ``ops/reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import PageLayout


class PageMover:
    """Moves tokens between the pages of one KV cache layout.

    Parameters
    ----------
    layout: where a backend puts a token inside a page; all layers share it.
    """

    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout
        self._strides = {part: layout.strides(part) for part in ("keys", "values")}
        self._flat = {part: getattr(layout, part).reshape(-1) for part in ("keys", "values")}

    def read(self, cache: Tensor, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Copy out the first ``count`` tokens of a block list.

        Parameters
        ----------
        cache: ``[num_blocks, H, block_size, 2 * D]``, one layer.
        blocks: ``[m]`` int64 block ids in token order, ``m * block_size >= count``.
        count: tokens.

        Returns
        -------
        Keys and values, each ``[H, count, D]`` contiguous, cache dtype.
        """
        pages = cache.index_select(0, blocks).flatten(2)
        return self._dense(pages, "keys", count), self._dense(pages, "values", count)

    def write(self, cache: Tensor, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill whole blocks with tokens; unused slots of the last block become zero.

        Zero because a kernel that reads a page as a whole would multiply stale NaNs by zero weights.

        Parameters
        ----------
        cache: ``[num_blocks, H, block_size, 2 * D]``, one layer; modified.
        blocks: ``[m]`` int64 distinct block ids in token order, ``m = ceil(count / block_size)``.
        keys, values: ``[H, count, D]``, cache dtype.
        """
        heads = cache.shape[1]
        pages = cache.new_zeros(blocks.shape[0], heads, cache.shape[2] * cache.shape[3])
        self._scatter(pages, "keys", keys)
        self._scatter(pages, "values", values)
        cache.index_copy_(0, blocks, pages.view(-1, heads, *cache.shape[2:]))

    def _part(self, pages: Tensor, part: str) -> Tensor | None:
        """View of the part as ``[m, H, block_size, D]`` if the layout is affine."""
        strides = self._strides[part]
        if strides is None:
            return None
        base, slot, dim = strides
        m, heads, size = pages.shape
        shape = (m, heads, self._layout.block_size, self._layout.head_size)
        return pages.as_strided(shape, (heads * size, size, slot, dim), base)

    def _dense(self, pages: Tensor, part: str, count: int) -> Tensor:
        m, heads, _ = pages.shape
        view = self._part(pages, part)
        if view is None:
            shape = (m, heads, self._layout.block_size, self._layout.head_size)
            view = pages.index_select(2, self._flat[part]).view(shape)
        return view.transpose(0, 1).reshape(heads, -1, self._layout.head_size)[:, :count].contiguous()

    def _scatter(self, pages: Tensor, part: str, tokens: Tensor) -> None:
        m, heads, _ = pages.shape
        block, dim = self._layout.block_size, self._layout.head_size
        padded = tokens
        if tokens.shape[1] < m * block:
            padded = torch.nn.functional.pad(tokens, (0, 0, 0, m * block - tokens.shape[1]))
        by_block = padded.view(heads, m, block, dim).transpose(0, 1)
        view = self._part(pages, part)
        if view is None:
            pages.index_copy_(2, self._flat[part], by_block.reshape(m, heads, -1))
        else:
            view.copy_(by_block)


def take_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ([H, k] int64) of ``tokens`` ([H, n, D]) for each head: ``[H, k, D]``."""
    heads, n, dim = tokens.shape
    # One row-wise gather over all heads: whole rows are copied, not single elements.
    rows = index + torch.arange(heads, device=index.device).unsqueeze(1) * n
    return tokens.reshape(heads * n, dim).index_select(0, rows.reshape(-1)).view(heads, -1, dim)
