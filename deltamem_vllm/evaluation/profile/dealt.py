# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""One way to share the memory of the first compaction among layers and heads, and what it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.analysis import Mask, held_mass

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Dealt:
    """One way to deal the memory of the first compaction to layers and heads; all arrays are [L, H_kv].

    Parameters
    ----------
    tokens
        Tokens that each holds, exact or coded.
    coded
        Those of them that are coded.
    memory
        Bytes that each holds, as the number of exact tokens that take as many.
    attention_mass
        Share of the window's attention on its tokens, 0 to 1.
    attention_coded
        The part of it that is on coded ones.
    utility_mass, utility_coded
        The same of the utility; None where utilities are no amounts (negative ones, or indices).
    """

    tokens: NDArray[np.int64]
    coded: NDArray[np.int64]
    memory: NDArray[np.int64]
    attention_mass: Floats
    attention_coded: Floats
    utility_mass: Floats | None
    utility_coded: Floats | None

    @classmethod
    def of(
        cls,
        exact: Mask,
        coded: Mask,
        memory: NDArray[np.int64],
        attention: NDArray[np.float32],
        utility: NDArray[np.float32] | None,
    ) -> Dealt:
        """From which tokens are exact and which are coded, and what was seen in them, each [L, H_kv, n]."""
        held = exact | coded
        return cls(
            tokens=held.sum(2),
            coded=coded.sum(2),
            memory=memory,
            attention_mass=held_mass(attention, held),
            attention_coded=_part(attention, held, exact),
            utility_mass=None if utility is None else held_mass(utility, held),
            utility_coded=None if utility is None else _part(utility, held, exact),
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values; masses to five places."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Dealt:
        """The inverse of `to_json`."""
        values: dict[str, Any] = {field.name: data[field.name] for field in fields(cls)}
        for name, value in values.items():
            values[name] = None if value is None else np.array(value)
        return cls(**values)


def _part(weights: NDArray[np.float32], held: Mask, exact: Mask) -> Floats:
    """What of the mass held is not on exact tokens: nothing where a head has no weight at all."""
    part: Floats = held_mass(weights, held) - held_mass(weights, exact)
    return part


def _plain(values: NDArray[Any] | None) -> list[Any] | None:
    if values is None:
        return None
    plain: list[Any] = (np.round(values, 5) if values.dtype.kind == "f" else values).tolist()
    return plain
