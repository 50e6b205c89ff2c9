# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Page numbers, slots and counts, checked before native code follows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_ids(name: str, ids: Tensor, shape: Sequence[int], end: int, start: int = 0) -> Tensor:
    """Whole numbers as contiguous int64. On a CPU their range is checked; other devices would have to be waited for.

    Parameters
    ----------
    name: for the error.
    ids: int32 or int64.
    shape: that they must have.
    start, end: every number is at least ``start`` and less than ``end``.

    Raises
    ------
    ValueError: wrong dtype or shape, or a number out of range.
    """
    if ids.dtype not in (torch.int32, torch.int64) or tuple(ids.shape) != tuple(shape):
        raise ValueError(f"{name} must be int32 or int64 {tuple(shape)}, got {ids.dtype} {tuple(ids.shape)}")
    ids = ids.to(torch.int64).contiguous()
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < start or high >= end:
            raise ValueError(f"{name} must be between {start} and {end - 1}, got {low if low < start else high}")
    return ids


def check_places(pages: Tensor, slots: Tensor, num_pages: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Places of tokens, page and slot, as contiguous int64 of equal shape, within the pool.

    Raises
    ------
    ValueError: wrong dtype, shapes that differ, or a place outside the pool.
    """
    return check_ids("page", pages, slots.shape, num_pages), check_ids("slot", slots, pages.shape, block_size)


def check_rows(pool: Tensor, shape: tuple[int, int], keys: Tensor, values: Tensor) -> None:
    """Memory for tokens of a pool: keys and values of this shape, as the pool's numbers, contiguous, where the pool is.

    Raises
    ------
    ValueError: one of them is not.
    """
    for name, rows in (("keys", keys), ("values", values)):
        fits = rows.shape == shape and rows.is_contiguous() and (rows.dtype, rows.device) == (pool.dtype, pool.device)
        if not fits:
            raise ValueError(
                f"{name} to write to must be contiguous {shape} {pool.dtype} on {pool.device}, "
                f"got {tuple(rows.shape)} {rows.dtype} on {rows.device} with strides {rows.stride()}"
            )
