# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the predictor knows of a cached entry: numbers from its key and value alone, the same when it is fitted and when
it rates.

No query and no position is among them, so they can be had from the cache at any time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_widths(key_dim: int, value_dim: int) -> tuple[int, ...]:
    """How many numbers each part of `feature_parts` has, for keys and values of these sizes."""
    return 1, key_dim, key_dim // 2, value_dim, 1, 1, 1, 1


def feature_parts(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    """The features of every entry, in parts: put next to each other, all of them would be a copy of the cache.

    Parameters
    ----------
    keys
        ``[H_kv, n, D]`` floating point, RoPE applied: all resident entries of each head, for the means.
    values
        ``[H_kv, n, D_v]``, same order.

    Returns
    -------
    tuple of Tensor
        Each ``[H_kv, n, width]`` float32, widths as of `feature_widths`: 1; the key; the length of each of its rotary
        pairs, that is of dimensions ``d`` and ``d + D / 2``, which no rotation changes; the value; the key's norm; the
        value's norm; the cosine between the key and the mean of the head's unit keys; the distance of the value from
        the head's mean value.
    """
    keys, values = keys.float(), values.float()
    half = keys.shape[2] // 2
    direction = F.normalize(keys, dim=-1)
    anchor = F.normalize(direction.mean(1, keepdim=True), dim=-1)
    return (
        torch.ones_like(keys[..., :1]),
        keys,
        torch.hypot(keys[..., :half], keys[..., half : 2 * half]),
        values,
        keys.norm(dim=-1, keepdim=True),
        values.norm(dim=-1, keepdim=True),
        direction @ anchor.transpose(1, 2),
        (values - values.mean(1, keepdim=True)).norm(dim=-1, keepdim=True),
    )
