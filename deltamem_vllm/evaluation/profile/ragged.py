# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Tokens of every (layer, kv head), where each pair has a number of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ragged:
    """For each (layer, kv head) a list of token numbers.

    Parameters
    ----------
    values
        int32, the lists one after the other, those of the first layer first.
    counts
        [L, H_kv] int64, their lengths.

    Raises
    ------
    ValueError
        The lengths do not add up to the values.
    """

    values: NDArray[np.int32]
    counts: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or int(self.counts.sum()) != len(self.values):
            raise ValueError(f"counts {self.counts.shape} add up to {self.counts.sum()}, not {len(self.values)} values")

    @classmethod
    def of(cls, pairs: Sequence[Sequence[Any]]) -> Ragged:
        """From `pairs[layer][head]`, arrays or lists of whole numbers; all layers have the same number of heads."""
        counts = np.array([[len(head) for head in layer] for layer in pairs], dtype=np.int64)
        values = np.concatenate([np.asarray(head, dtype=np.int32) for layer in pairs for head in layer])
        return cls(values, counts)

    def __getitem__(self, at: tuple[int, int]) -> NDArray[np.int32]:
        """The list of one (layer, kv head)."""
        start = int(self._starts[at])
        return self.values[start : start + int(self.counts[at])]

    def layers(self) -> Iterator[list[NDArray[np.int32]]]:
        """The lists of each layer's heads."""
        layers, heads = self.counts.shape
        return ([self[layer, head] for head in range(heads)] for layer in range(layers))

    def of_these(self, index: Ragged) -> Ragged:
        """Of each list the entries at `index`, ascending numbers below its length.

        Raises
        ------
        ValueError
            A list has fewer entries.
        """
        ends = np.repeat(self.counts.ravel(), index.counts.ravel())
        if (index.values >= ends).any() or (index.values < 0).any():
            raise ValueError("a survivor's index is beyond the tokens that its head had")
        return Ragged(self.values[np.repeat(self._starts.ravel(), index.counts.ravel()) + index.values], index.counts)

    def followed_by(self, start: int, stop: int) -> Ragged:
        """Each list with `start` to `stop - 1` behind it."""
        new = np.arange(start, stop, dtype=np.int32)
        return Ragged.of([[np.concatenate([head, new]) for head in layer] for layer in self.layers()])

    def mask(self, total: int) -> NDArray[np.bool_]:
        """[L, H_kv, total], true at the numbers of each list."""
        mask = np.zeros((self.counts.size, total), dtype=bool)
        mask[np.repeat(np.arange(self.counts.size), self.counts.ravel()), self.values] = True
        return mask.reshape(*self.counts.shape, total)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        counts = self.counts.ravel()
        return (np.cumsum(counts) - counts).reshape(self.counts.shape)
