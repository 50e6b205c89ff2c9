# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Sums over everything that heads have had in their cache, kept or evicted since: what is usual for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SHORTEST = 1e-12


@dataclass(frozen=True)
class Seen:
    """Sums over the entries of some kv heads, all of which have had equally many.

    Means of what is left after an eviction would say what was kept, not what the text is like.

    Attributes
    ----------
    directions
        ``[..., H_kv, D]`` float32, sum of the keys' unit vectors.
    values
        ``[..., H_kv, D_v]`` float32, sum of the values.
    count
        Entries of each head.
    """

    directions: Tensor
    values: Tensor
    count: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Seen:
        """The sums over keys ``[..., H_kv, n, D]`` and values ``[..., H_kv, n, D_v]``, any floating point."""
        keys, values = keys.float(), values.float()
        shortened = norms(keys).reciprocal().transpose(-1, -2)  # [..., H_kv, 1, n]
        return cls((shortened @ keys).squeeze(-2), values.sum(-2), keys.shape[-2])

    @classmethod
    def joined(cls, parts: Sequence[Seen], layers: int) -> Seen:
        """Those of all heads of all layers, ``[L, H_kv, ...]``, from those of some heads each, in order."""
        directions = torch.cat([part.directions for part in parts])
        values = torch.cat([part.values for part in parts])
        heads = len(directions) // layers
        return cls(
            directions.view(layers, heads, directions.shape[1]),
            values.view(layers, heads, values.shape[1]),
            parts[0].count,
        )

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.directions + other.directions, self.values + other.values, self.count + other.count)

    def __getitem__(self, own: int | slice) -> Seen:
        """Those of one layer, or of some heads: an index into the first dimension."""
        return Seen(self.directions[own], self.values[own], self.count)


def norms(keys: Tensor) -> Tensor:
    """Lengths of vectors ``[..., n, D]``, ``[..., n, 1]``; none is 0, so that one may divide by them."""
    length: Tensor = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    return length.clamp_min(_SHORTEST)
