# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How many running requests vLLM preempts in a step: its own loop, on numbers of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Asker:
    """One running request before a step.

    Attributes
    ----------
    held: blocks in its block table.
    wanted: more blocks that the step asks for.
    """

    held: int
    wanted: int


def preemptions(running: Sequence[Asker], order: Sequence[int], free: int, reserve: int) -> int:
    """Requests that vLLM preempts so that the others fit.

    Parameters
    ----------
    running: in the order in which vLLM gives them blocks.
    order: indices into ``running``, the one that is preempted first comes first.
    free: blocks of the pool.
    reserve: free blocks that must be left by whoever asks; given up with the first preemption.

    Returns
    -------
    How many. Each gives back all it holds, as if no block were shared: where some are, vLLM preempts as many or more.
    """
    victims = iter(order)
    given = [asker.held for asker in running]
    gone: set[int] = set()
    for index, asker in enumerate(running):
        if index in gone or not asker.wanted:
            continue
        while asker.wanted + reserve > free:
            victim = next(one for one in victims if one not in gone)
            gone.add(victim)
            free, reserve = free + given[victim], 0
            if victim == index:
                return len(gone)  # vLLM gives no more blocks to running requests in this step
        free -= asker.wanted
        given[index] += asker.wanted
    return len(gone)
