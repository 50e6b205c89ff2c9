# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the kernels' wrappers check of their arguments: shapes and dtypes, never values, which are on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import PageLayout


def check_pool(pool: Tensor, layout: PageLayout, dtypes: Sequence[torch.dtype]) -> None:
    """Whether a pool is of pages of this layout, in one of these dtypes.

    Raises
    ------
    ValueError: not ``[num_pages, block_size * 2 * D]`` with at least one page and the elements of a page side by side.
    """
    width = layout.block_size * 2 * layout.head_size
    if pool.dim() != 2 or pool.shape[1] != width or not pool.shape[0] or pool.stride(1) != 1:
        raise ValueError(
            f"the pool must be [pages, {width}] with its elements side by side, "
            f"got {tuple(pool.shape)} with strides {pool.stride()}"
        )
    if pool.dtype not in dtypes:
        raise ValueError(
            f"the pool must be {', '.join(map(str, dtypes))}, got {pool.dtype}; fp8 KV caches are not served"
        )


def check_raw(raw: Tensor, page_bytes: int) -> None:
    """Whether a pool, read as bytes, has pages of this size, with words where words are read.

    Raises
    ------
    ValueError: not uint8 ``[num_pages, page_bytes]`` with at least one page and its bytes side by side.
    """
    if raw.dtype != torch.uint8 or raw.dim() != 2 or raw.shape[1] != page_bytes or raw.stride(1) != 1:
        raise ValueError(
            f"the pool as bytes must be uint8 [num_pages, {page_bytes}] with its bytes side by side, "
            f"got {raw.dtype} {tuple(raw.shape)} with strides {raw.stride()}"
        )
    if not raw.shape[0] or raw.stride(0) % 4 or raw.storage_offset() % 4:
        raise ValueError(
            "the pool as bytes needs at least one page, and pages that begin at multiples of 4 bytes, "
            f"got {raw.shape[0]} pages {raw.stride(0)} bytes apart from byte {raw.storage_offset()} on"
        )


def check_table(name: str, table: Tensor, rows: int, dims: int) -> None:
    """Whether a table of pages or a list of counts is int32 with its last dimension side by side.

    Raises
    ------
    ValueError: it is not, or has other sizes.
    """
    if table.dtype != torch.int32 or table.dim() != dims or table.shape[0] != rows:
        raise ValueError(
            f"{name} must be int32 with {dims} dimension(s) and {rows} rows, got {table.dtype} {tuple(table.shape)}"
        )
    if table.numel() and table.stride(-1) != 1:
        raise ValueError(f"{name} must have its last dimension side by side, got strides {table.stride()}")


def check_numbers(name: str, numbers: Tensor, count: int) -> None:
    """Whether there are ``[count]`` whole numbers side by side, int32 or int64.

    Raises
    ------
    ValueError: there are not.
    """
    if numbers.dtype not in (torch.int32, torch.int64) or numbers.shape != (count,) or not numbers.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous int32 or int64 ({count},), got {numbers.dtype} {tuple(numbers.shape)}"
        )


def affine(layout: PageLayout, part: str) -> tuple[int, int, int]:
    """``(base, slot stride, dim stride)`` of `"keys"` or `"values"`, in elements.

    Raises
    ------
    ValueError: the layout is not affine; only kernels of some CPUs have such.
    """
    strides = layout.strides(part)
    if strides is None:
        raise ValueError(
            f"the GPU kernels need pages in which the place of an element is base + slot * a + dim * b; the {part} of "
            "this layout are stored otherwise"
        )
    return strides
