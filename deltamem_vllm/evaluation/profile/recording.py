# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the engine wrote down while it served one prompt, and which tokens that leaves at each moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.ragged import Ragged

Kind = Literal["prefill", "compaction", "decode"]
Floats = NDArray[np.float32]


class Step(TypedDict):
    """One engine step; levels are those at its end, its new tokens included.

    `kind` is `compaction` for a step that compacts the request before it computes its `new_tokens`.
    Tokens are nominal: where pages were dealt, a mean over all (layer, kv head); bytes and blocks are exact.
    `logical_bytes` is what the request would hold if nothing were evicted, `tier_bytes` what it holds.
    """

    kind: Kind
    new_tokens: int
    logical_tokens: int
    resident_tokens: int
    logical_bytes: int
    tier_bytes: dict[str, int]
    blocks: int


@dataclass(frozen=True)
class Compaction:
    """One compaction.

    Parameters
    ----------
    facts
        Fields of the scheduler's plan (see `memory.plans.CompactionPlan`) with blocks as counts, and `step`, the
        index of its step.
        Its token counts are nominal: where pages were dealt, a mean over all (layer, kv head).
    survivors
        Of each (layer, kv head), indices into its own resident tokens before the compaction, ascending.
    """

    facts: Mapping[str, Any]
    survivors: Ragged


@dataclass(frozen=True)
class Recording:
    """What the engine wrote down.

    Parameters
    ----------
    steps, compactions
        In order.
    utility
        [L, H_kv, n] float32: what the scorer gave each resident token at the first compaction, higher = keep; before
        repeats are discounted (`redundancy`).
    attention
        [L, H_kv, n] float32: attention of the observation window at that moment, mean over its queries and over the
        query heads of a kv head; rows sum to 1.
    written
        Ids of the generated tokens.
    counters
        The policy's own counters at the end, by public name.
    """

    steps: Sequence[Step]
    compactions: Sequence[Compaction]
    utility: Floats
    attention: Floats
    written: Sequence[int]
    counters: Mapping[str, Any]


def lengths_before(compactions: Sequence[Compaction]) -> list[NDArray[np.int64]]:
    """Resident tokens of each (layer, kv head) when each compaction began, [L, H_kv].

    Between two compactions every head gains the same new tokens.

    Raises
    ------
    ValueError
        They do not average to what the scheduler counted.
    """
    found: list[NDArray[np.int64]] = []
    for number, compaction in enumerate(compactions):
        logical = int(compaction.facts["logical_len"])
        if number:
            before = compactions[number - 1]
            lengths = before.survivors.counts + (logical - int(before.facts["logical_len"]))
        else:
            lengths = np.full_like(compaction.survivors.counts, logical)
        if int(lengths.sum()) != lengths.size * compaction.facts["resident_before"]:
            raise ValueError(
                f"compaction {number} started from {compaction.facts['resident_before']} resident tokens, but "
                f"{lengths.mean():g} follow from those before it"
            )
        found.append(lengths)
    return found


def positions_after(compactions: Sequence[Compaction]) -> list[Ragged]:
    """Logical positions of the survivors of each compaction, ascending in each (layer, kv head).

    Raises
    ------
    ValueError
        Survivors that cannot follow from those of the compaction before.
    """
    lengths_before(compactions)
    found: list[Ragged] = []
    for number, compaction in enumerate(compactions):
        logical = int(compaction.facts["logical_len"])
        if number:
            resident = found[-1].followed_by(int(compactions[number - 1].facts["logical_len"]), logical)
        else:
            nothing = Ragged(np.zeros(0, dtype=np.int32), np.zeros_like(compaction.survivors.counts))
            resident = nothing.followed_by(0, logical)
        found.append(resident.of_these(compaction.survivors))
    return found
