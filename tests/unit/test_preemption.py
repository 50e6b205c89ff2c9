# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How many running requests a step preempts, on numbers of blocks; vLLM's own loop is the judge in tests/property."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from deltamem_vllm.memory.preemption import Asker, preemptions

LAST_FIRST = [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("wanted", "held", "free", "reserve", "expected"),
    [
        ([1, 1, 1, 1], [5, 5, 5, 5], 4, 0, 0),  # all fit
        ([1, 1, 1, 1], [5, 5, 5, 5], 3, 0, 1),  # the last one lacks a block and is its own victim
        ([9, 1, 1, 1], [5, 5, 5, 5], 0, 0, 2),  # the first takes the blocks of two, which leaves one for the second
        ([9, 2, 1, 1], [5, 5, 5, 5], 0, 0, 3),  # ... which lacks one more, and preempts itself
        ([0, 0, 0, 0], [5, 5, 5, 5], 0, 9, 0),  # nobody asks, so nobody is held to the reserve
        ([1, 0, 0, 0], [5, 5, 5, 5], 3, 3, 1),  # the reserve counts until somebody had to go
        ([1, 1, 1, 0], [1, 1, 1, 0], 1, 0, 2),  # a victim that holds nothing is preempted in vain
    ],
)
def test_as_many_go_as_it_takes(
    wanted: Sequence[int], held: Sequence[int], free: int, reserve: int, expected: int
) -> None:
    running = [Asker(*pair) for pair in zip(held, wanted, strict=True)]
    assert preemptions(running, LAST_FIRST, free, reserve) == expected


def test_a_victim_gives_back_what_it_was_given_in_this_step() -> None:
    """By priority, one that was served already may be preempted for a later one."""
    running = [Asker(held=2, wanted=3), Asker(held=2, wanted=5)]
    assert preemptions(running, [0, 1], free=3, reserve=0) == 1
