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
    `resident_tokens` is nominal: where pages were dealt, a mean over all (layer, kv head) of what their pages would
    hold uncoded. `cold_tokens` is how many tokens a pair holds coded, a mean rounded down; bytes and blocks are exact.
    `logical_bytes` is what the request would hold if nothing were evicted, `tier_bytes` what it holds: `hot` in pages
    of exact tokens, `cold` in pages of coded ones.
    """

    kind: Kind
    new_tokens: int
    logical_tokens: int
    resident_tokens: int
    logical_bytes: int
    tier_bytes: dict[str, int]
    cold_tokens: int
    blocks: int


@dataclass(frozen=True)
class Coded:
    """What one compaction coded, and which cold pages it left.

    Parameters
    ----------
    tokens
        Of each (layer, kv head), indices into its own exact tokens before the compaction, of those that it coded: one
        new page after the other, ascending within each.
    sizes
        Of each, the tokens of each of its new pages.
    stay
        Of each, the numbers of those of its cold pages that stay. Pages are numbered from 0: those that the compaction
        before had made, then those that stayed in it.

    Raises
    ------
    ValueError
        The sizes do not add up to the tokens.
    """

    tokens: Ragged
    sizes: Ragged
    stay: Ragged

    def __post_init__(self) -> None:
        held = [[int(pages.sum()) for pages in layer] for layer in self.sizes.layers()]
        if not np.array_equal(held, self.tokens.counts):
            raise ValueError("the tokens of a head's new cold pages do not add up to those that it coded")

    @property
    def pages(self) -> NDArray[np.int64]:
        """[L, H_kv] cold pages after the compaction."""
        return self.sizes.counts + self.stay.counts


@dataclass(frozen=True)
class Compaction:
    """One compaction.

    Parameters
    ----------
    facts
        Fields of the scheduler's plan (see `memory.plans.CompactionPlan`) with blocks as counts, and `step`, the
        index of its step.
        Its token counts are nominal: where pages were dealt, a mean over all (layer, kv head) of what their pages would
        hold uncoded.
    survivors
        Of each (layer, kv head), indices into its own exact tokens before the compaction, ascending: those that stay
        exact.
    coded
        What became and stayed coded; None where no page can be cold.
    """

    facts: Mapping[str, Any]
    survivors: Ragged
    coded: Coded | None = None


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
