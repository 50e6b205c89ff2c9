# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Move tokens between single pages of the whole pool, whichever layer and head they belong to.

The pool is every layer's KV cache read as one tensor ``[NP, block_size * 2 * D]``, a page a row. On a CPU the native
library does the work where the layout is affine (`ops/gather.py`); all else is plain torch: no data-dependent shapes
and no waiting for the device. The slow, obvious definition is in ``ops/reference.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltamem_vllm.ops.checks import check_rows
from deltamem_vllm.ops.gather import PoolStrides, gather_pages, gather_tokens
from deltamem_vllm.ops.layout import PageLayout

_PARTS = ("keys", "values")


class DealtPages:
    """Reads and writes tokens of the pool by page id.

    Parameters
    ----------
    layout: where a backend puts a token inside a page; all pages share it.

    Attributes
    ----------
    layout: as given.
    """

    def __init__(self, layout: PageLayout) -> None:
        self.layout = layout
        self._strides = {part: layout.strides(part) for part in _PARTS}
        self._offsets: dict[str, Tensor] = {part: getattr(layout, part) for part in _PARTS}
        self._width = layout.block_size * 2 * layout.head_size

    def read(self, pool: Tensor, pages: Tensor, lengths: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Copy out the resident tokens of one layer's heads.

        Parameters
        ----------
        pool: ``[NP, block_size * 2 * D]``.
        pages: ``[H, p]`` int32 or int64, page ids in resident order. Entries past a head's tokens must be valid ids
            too; what these pages hold does not matter.
        lengths: tokens of each head, or of all of them; known on the host.

        Returns
        -------
        Keys and values, each ``[H, n, D]`` contiguous in the pool's dtype, n = the largest length. Shorter heads end in
        zeros.

        Raises
        ------
        ValueError: a shape, dtype or length does not fit the layout.
        """
        self._check_pool(pool)
        pages = _ids("pages", pages, 2)
        heads, p = pages.shape
        counts = [lengths] * heads if isinstance(lengths, int) else list(lengths)
        most = p * self.layout.block_size
        if len(counts) != heads or not heads or min(counts) < 0 or max(counts) > most:
            raise ValueError(
                f"lengths must be one number or {heads}, between 0 and {most} (the tokens of {p} pages), got {lengths}"
            )
        n = max(counts)
        used = pages[:, : -(-n // self.layout.block_size)].reshape(-1)
        dense = []
        for part in _PARTS:
            view = self._view(pool, part)
            if view is None:
                tokens = pool[used.unsqueeze(1), self._offsets[part].view(1, -1)]
            else:
                tokens = view[used] if self._apart(part) else view.index_select(0, used)
            tokens = tokens.reshape(heads, used.shape[0] // heads * self.layout.block_size, self.layout.head_size)
            tokens = tokens[:, :n].contiguous()
            for head, count in enumerate(counts):
                tokens[head, count:] = 0
            dense.append(tokens)
        return dense[0], dense[1]

    def gather(
        self, pool: Tensor, page: Tensor, slot: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Copy single tokens out of the pool.

        Parameters
        ----------
        pool: ``[NP, block_size * 2 * D]``.
        page, slot: ``[K]`` int32 or int64, where each token stands: page id and slot in that page.
        out: where to put the result: what this method would return. Fresh memory takes longer to get than to fill.

        Returns
        -------
        Keys and values, each ``[K, D]`` contiguous in the pool's dtype.

        Raises
        ------
        ValueError: a shape or dtype does not fit.
        """
        self._check_pool(pool)
        page, slot = _ids("page", page, 1), _ids("slot", slot, 1)
        if page.shape != slot.shape:
            raise ValueError(f"page and slot must be equally long, got {page.shape[0]} and {slot.shape[0]}")
        strides = self._native_strides(pool)
        native = None if strides is None else gather_tokens(pool, strides, page, slot, out)
        if native is not None:
            return native
        keys, values = self._gather(pool, "keys", page, slot), self._gather(pool, "values", page, slot)
        if out is None:
            return keys, values
        check_rows(pool, (page.shape[0], self.layout.head_size), *out)
        return out[0].copy_(keys), out[1].copy_(values)

    def move(self, pool: Tensor, page: Tensor, slot: Tensor, targets: Tensor, in_place: bool) -> None:
        """Fill whole pages with tokens of other pages.

        Parameters
        ----------
        pool: ``[NP, block_size * 2 * D]``; modified.
        page, slot: ``[p * block_size]`` int32 or int64, where the tokens stand: ``block_size`` of them for each target.
        targets: ``[p]`` int32 or int64, distinct page ids.
        in_place: targets may be among ``page``. That may take memory for as many pages, and always does in plain torch.
            Otherwise a page that is both ends up with undefined tokens.

        Raises
        ------
        ValueError: a shape or dtype does not fit.
        """
        strides = self._native_strides(pool)
        if strides is None or not gather_pages(pool, strides, page, slot, targets, in_place):
            self.scatter(pool, targets, *self.gather(pool, page, slot))

    def scatter(self, pool: Tensor, pages: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fill whole pages with tokens.

        Parameters
        ----------
        pool: ``[NP, block_size * 2 * D]``; modified.
        pages: ``[p]`` int32 or int64, distinct page ids.
        keys, values: ``[p * block_size, D]`` in the pool's dtype: ``block_size`` tokens for each page.

        Raises
        ------
        ValueError: a shape or dtype does not fit.
        """
        self._check_pool(pool)
        pages = _ids("pages", pages, 1)
        count, size, dim = pages.shape[0], self.layout.block_size, self.layout.head_size
        for part, tokens in zip(_PARTS, (keys, values), strict=True):
            if tokens.shape != (count * size, dim) or tokens.dtype != pool.dtype:
                raise ValueError(
                    f"{part} for {count} pages must be {(count * size, dim)} in {pool.dtype}, "
                    f"got {tuple(tokens.shape)} in {tokens.dtype}"
                )
        for part, tokens in zip(_PARTS, (keys, values), strict=True):
            view = self._view(pool, part)
            if view is None:
                pool[pages.unsqueeze(1), self._offsets[part].view(1, -1)] = tokens.reshape(count, -1)
            else:
                view.index_copy_(0, pages, tokens.reshape(count, size, dim))

    def _gather(self, pool: Tensor, part: str, page: Tensor, slot: Tensor) -> Tensor:
        view = self._view(pool, part)
        if view is None:
            return pool[page.unsqueeze(1), self._offsets[part].index_select(0, slot)]
        _, step, _ = view.stride()
        if self._apart(part) or pool.stride(0) % step:
            return view[page, slot]
        # Tokens are rows of one matrix: copying rows is several times faster than indexing two dimensions.
        per_page = pool.stride(0) // step
        rows = pool.as_strided(
            ((pool.shape[0] - 1) * per_page + view.shape[1], view.shape[2]), (step, 1), view.storage_offset()
        )
        return rows.index_select(0, page * per_page + slot)

    def _native_strides(self, pool: Tensor) -> PoolStrides | None:
        """What the native library needs to know; None where the layout is not affine."""
        self._check_pool(pool)
        keys, values = self._strides["keys"], self._strides["values"]
        if keys is None or values is None:
            return None
        return PoolStrides(pool.stride(0), keys, values, self.layout.block_size, self.layout.head_size)

    def _apart(self, part: str) -> bool:
        """Whether the elements of a token do not lie side by side: then ``index_select`` is the slow way."""
        strides = self._strides[part]
        return strides is not None and strides[2] != 1

    def _view(self, pool: Tensor, part: str) -> Tensor | None:
        """The part of all pages as ``[NP, block_size, D]`` if the layout is affine."""
        strides = self._strides[part]
        if strides is None:
            return None
        base, slot, dim = strides
        shape = (pool.shape[0], self.layout.block_size, self.layout.head_size)
        return pool.as_strided(shape, (pool.stride(0), slot, dim), pool.storage_offset() + base)

    def _check_pool(self, pool: Tensor) -> None:
        if pool.dim() != 2 or pool.shape[1] != self._width or pool.stride(1) != 1:
            raise ValueError(
                f"the pool must be [pages, {self._width}] with its elements side by side, "
                f"got {tuple(pool.shape)} with strides {pool.stride()}"
            )


def _ids(name: str, ids: Tensor, dims: int) -> Tensor:
    """Ids as int64: page tables hold int32, for which a large pool's offsets would overflow."""
    if ids.dim() != dims or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64 with {dims} dimension(s), got {tuple(ids.shape)} {ids.dtype}")
    return ids.long()
