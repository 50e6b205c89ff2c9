# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Scores as integers, so that they can be sorted together with what breaks ties."""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_BITS = 32
"""Bits below a rank that are free for an index."""
INDEX_MASK = 0xFFFFFFFF
# Beside the ordered bits of numbers, which lie between those of -inf (-0x7F800001) and +inf (0x7F800000).
FIRST_RANK = 0x7FFFFFFF
"""Ranks before every number."""
LAST_RANK = -0x80000000
"""Ranks after every number."""


def ordered_bits(numbers: Tensor) -> Tensor:
    """float32 numbers as int64 of 32 bits in the same order; -0.0 equals 0.0 and NaN equals -inf."""
    clean = torch.where(numbers.isnan(), float("-inf"), numbers) + 0.0
    bits = clean.contiguous().view(torch.int32)
    # The magnitude bits of negatives run the wrong way.
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def newest_first(rank: Tensor) -> Tensor:
    """Indices of the last dimension, highest rank first, of equal ranks the higher index: int64, ``rank``'s shape.

    One integer per entry, (rank, index), makes all entries distinct, so any sort gives the same result on any device.
    """
    index = torch.arange(rank.shape[-1], device=rank.device)
    keys = (rank << INDEX_BITS).bitwise_or_(index)
    return keys.sort(dim=-1, descending=True).values.bitwise_and_(INDEX_MASK)
