# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""gather_pages on CPU: tokens moved between pages of the pool by the native library, in any affine layout.

`ops/dealt_pages.py` is what callers use: it serves every layout and device, and comes here where it can.
"""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.ops import native
from deltamem_vllm.ops.checks import check_ids, check_places, check_rows
from deltamem_vllm.ops.layout import PageLayout

_ITEM_BYTES = (1, 2, 4)

# What writes as much goes past the caches, as it would only push itself out of them: what an L3 cache of today holds.
# Less is written as usual, so that the next step finds it there.
_STREAMED_BYTES = 32 * 2**20

# Pages filled before the first of them is written, where targets are among the sources: they stay in an L2 cache.
_TOGETHER_BYTES = 256 * 2**10


@dataclass(frozen=True)
class PoolStrides:
    """Where elements stand in a pool of affine pages, in elements.

    Attributes
    ----------
    page: from a page to the next.
    keys, values: ``(base, from slot to slot, from dimension to dimension)`` inside a page.
    slots, dim: of a page; of a key.
    """

    page: int
    keys: tuple[int, int, int]
    values: tuple[int, int, int]
    slots: int
    dim: int

    @staticmethod
    def of(pool: Tensor, layout: PageLayout) -> PoolStrides | None:
        """Those of this pool, ``[num_pages, block_size * 2 * D]``; None where offsets are not affine.

        Raises
        ------
        ValueError: the pool's pages are not of this layout.
        """
        width = layout.block_size * 2 * layout.head_size
        if pool.dim() != 2 or pool.shape[1] != width or pool.stride(1) != 1:
            raise ValueError(
                f"the pool must be [pages, {width}] with its elements side by side, "
                f"got {tuple(pool.shape)} with strides {pool.stride()}"
            )
        keys, values = layout.strides("keys"), layout.strides("values")
        if keys is None or values is None:
            return None
        return PoolStrides(pool.stride(0), keys, values, layout.block_size, layout.head_size)

    def argument(self) -> ctypes.Array[ctypes.c_int64]:
        """As the library takes it (csrc/cpu/token_move.h)."""
        return (ctypes.c_int64 * 7)(*self.keys, *self.values, self.slots)


def gather_tokens(
    pool: Tensor, strides: PoolStrides, page: Tensor, slot: Tensor, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """Copy single tokens out of the pool.

    Parameters
    ----------
    pool: ``[num_pages, block_size * 2 * D]``.
    strides: of the pool.
    page, slot: ``[K]`` int32 or int64, where each token stands.
    out: where to put the result: what this function would return.

    Returns
    -------
    Keys and values, ``[K, D]`` contiguous in the pool's dtype; None if the library cannot do it (another device, kind
    of number, or no library).

    Raises
    ------
    ValueError: a shape or dtype does not fit, or a place is outside the pool.
    """
    library = _library_for(pool)
    if library is None:
        return None
    page, slot = check_places(page, slot, pool.shape[0], strides.slots)
    shape = (page.shape[0], strides.dim)
    keys, values = out or (torch.empty(shape, dtype=pool.dtype), torch.empty(shape, dtype=pool.dtype))
    check_rows(pool, shape, keys, values)
    library.deltamem_gather_tokens(
        *_pool_arguments(pool, strides),
        *map(native.pointer, (page, slot)),
        native.int64(page.shape[0]),
        *map(native.pointer, (keys, values)),
        streamed(keys.nbytes + values.nbytes),
    )
    return keys, values


def gather_pages(
    pool: Tensor, strides: PoolStrides, page: Tensor, slot: Tensor, targets: Tensor, in_place: bool
) -> bool:
    """Fill whole pages of the pool with tokens of other pages, page by page.

    Parameters
    ----------
    pool: ``[num_pages, block_size * 2 * D]``; modified.
    strides: of the pool.
    page, slot: ``[p * block_size]`` int32 or int64, where the tokens of each target stand, in the order of its slots.
    targets: ``[p]`` int32 or int64, distinct page ids.
    in_place: targets may be among ``page``: they are filled in an order in which that is safe, and what stands in a
        page is set aside where no order is. At worst, if every page takes tokens from many others, that is most pages.

    Returns
    -------
    Whether it was done; see `gather_tokens`.

    Raises
    ------
    ValueError: a shape or dtype does not fit, or a place is outside the pool.
    """
    library = _library_for(pool)
    if library is None:
        return False
    targets = check_ids("targets", targets, (targets.numel(),), pool.shape[0])
    count = targets.shape[0]
    if page.shape != (count * strides.slots,):
        raise ValueError(f"{count} pages take {count * strides.slots} tokens, got {tuple(page.shape)}")
    page, slot = check_places(page, slot, pool.shape[0], strides.slots)
    together = max(1, _TOGETHER_BYTES // (pool.shape[1] * pool.element_size()))
    memory = kept_pages(pool, together + count) if in_place else None
    library.deltamem_gather_pages(
        *_pool_arguments(pool, strides),
        *map(native.pointer, (page, slot, targets)),
        native.int64(count),
        streamed(count * pool.shape[1] * pool.element_size()),
        None if memory is None else native.pointer(memory),
        native.int64(together),
    )
    return True


_MOST_KEPT = 128 * 2**20
_kept = threading.local()


def kept_pages(pool: Tensor, count: int) -> Tensor:
    """`kept_memory` for ``count`` pages like the pool's, ``[count, pool.shape[1]]``."""
    return kept_memory((count, pool.shape[1]), pool.dtype)


def kept_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of a CPU for a contiguous tensor, whatever it holds.

    The same memory for every call of a thread, valid until the next one: the operating system takes longer to hand
    out fresh memory than it takes to move pages into it. More than 128 MiB are not kept; of what is, only what was ever
    written takes memory.
    """
    needed = math.prod(shape) * dtype.itemsize
    if needed > _MOST_KEPT:
        return torch.empty(shape, dtype=dtype)
    held: Tensor | None = getattr(_kept, "memory", None)
    if held is None or held.numel() < needed:
        held = _kept.memory = torch.empty(needed, dtype=torch.uint8)
    return held[:needed].view(dtype).view(shape)


def streamed(written: int) -> int:
    """Whether the library should write so many bytes past the caches: 0 or 1, as it takes it."""
    return int(written >= _STREAMED_BYTES)


def _library_for(pool: Tensor) -> ctypes.CDLL | None:
    fits = pool.device.type == "cpu" and pool.element_size() in _ITEM_BYTES
    return native.library() if fits else None


def _pool_arguments(pool: Tensor, strides: PoolStrides) -> tuple[object, ...]:
    size = pool.element_size()
    return (
        *map(native.int64, (size, strides.dim)),
        native.pointer(pool),
        native.int64(strides.page * size),
        strides.argument(),
    )
