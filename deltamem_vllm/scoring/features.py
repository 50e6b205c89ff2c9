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

from deltamem_vllm.scoring.seen import Seen, norms


def feature_widths(key_dim: int, value_dim: int) -> tuple[int, ...]:
    """How many numbers each part of `feature_parts` has, for keys and values of these sizes."""
    return 1, key_dim, key_dim // 2, value_dim, 1, 1, 1, 1


def feature_parts(keys: Tensor, values: Tensor, seen: Seen | None = None) -> tuple[Tensor, ...]:
    """The features of every entry, in parts: put next to each other, all of them would be a copy of the cache.

    Parameters
    ----------
    keys
        ``[H_kv, n, D]`` floating point, RoPE applied.
    values
        ``[H_kv, n, D_v]``, same order.
    seen
        What the means are of: over these entries and all before. None: over these.

    Returns
    -------
    tuple of Tensor
        Each ``[H_kv, n, width]`` float32, widths as of `feature_widths`: 1; the key; the length of each of its rotary
        pairs, that is of dimensions ``d`` and ``d + D / 2``, which no rotation changes; the value; the key's norm; the
        value's norm; the cosine between the key and the mean of the head's unit keys; the distance of the value from
        the head's mean value.
    """
    keys, values = keys.float(), values.float()
    usual = Seen.of(keys, values) if seen is None else seen
    half, length = keys.shape[2] // 2, norms(keys)
    anchor = F.normalize(usual.directions, dim=-1).unsqueeze(2)
    return (
        torch.ones_like(keys[..., :1]),
        keys,
        torch.hypot(keys[..., :half], keys[..., half : 2 * half]),
        values,
        length,
        values.norm(dim=-1, keepdim=True),
        keys @ anchor / length,
        (values - (usual.values / usual.count).unsqueeze(1)).norm(dim=-1, keepdim=True),
    )
