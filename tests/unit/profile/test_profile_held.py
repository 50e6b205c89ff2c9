# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which tokens a profile says are exact, coded or gone: followed through compactions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deltamem_vllm.evaluation.profile.held import held_after, lengths_before
from deltamem_vllm.evaluation.profile.ragged import Ragged
from deltamem_vllm.evaluation.profile.recording import Coded
from tests.support.profile_toy import BLOCK, COLD, HEADS, HOT, LAYERS, MADE, PROMPT, STAY, make, recording


@pytest.mark.parametrize("dealing", ["equal", "global"])
def test_survivors_are_followed_through_compactions(dealing: str) -> None:
    made = recording(dealing=dealing)
    before = lengths_before(made.compactions, BLOCK)
    first, second = (held.exact for held in held_after(made.compactions, BLOCK))
    assert (before[0] == PROMPT).all()
    for at in np.ndindex(LAYERS, HEADS):
        assert np.array_equal(first[at], made.compactions[0].survivors[at])
        resident = [*first[at], *range(PROMPT, PROMPT + 16)]
        assert len(resident) == before[1][at]
        assert second[at].tolist() == [resident[i] for i in made.compactions[1].survivors[at]]
    assert (len({*first.counts.ravel()}) > 1) == (dealing == "global")


def test_survivors_that_do_not_follow_are_refused() -> None:
    first, second = recording().compactions
    wrong = replace(second, facts={**second.facts, "resident_before": 41})
    with pytest.raises(ValueError, match="started from 41 resident tokens, but 40 follow"):
        held_after([first, wrong], BLOCK)
    beyond = Ragged(second.survivors.values + 1, second.survivors.counts)
    with pytest.raises(ValueError, match="beyond the tokens that its head had"):
        held_after([first, replace(second, survivors=beyond)], BLOCK)


def test_ragged_lists() -> None:
    pairs = [[[0, 2], [1]], [[], [3, 4, 5]]]
    made = Ragged.of(pairs)
    assert made.counts.tolist() == [[2, 1], [0, 3]]
    assert [[head.tolist() for head in layer] for layer in made.layers()] == pairs
    assert made[1, 1].tolist() == [3, 4, 5]
    assert made.of_these(Ragged.of([[[1], [0]], [[], [0, 2]]])).values.tolist() == [2, 1, 3, 5]
    longer = made.followed_by(6, 8)
    assert longer[1, 0].tolist() == [6, 7] and longer[0, 0].tolist() == [0, 2, 6, 7]
    assert np.argwhere(made.mask(6)).tolist() == [[0, 0, 0], [0, 0, 2], [0, 1, 1], [1, 1, 3], [1, 1, 4], [1, 1, 5]]
    with pytest.raises(ValueError, match="add up to 6, not 5 values"):
        Ragged(made.values[:5], made.counts)


def test_coded_tokens_are_followed_through_compactions() -> None:
    made = recording(dealing="global", cold=True)
    first, second = made.compactions
    held = held_after(made.compactions, BLOCK)
    assert first.coded is not None and second.coded is not None
    for layer, head in np.ndindex(LAYERS, HEADS):
        at = (layer, head)

        def pages(coded: Coded, positions: list[int], made: list[int], at: tuple[int, int] = at) -> list[list[int]]:
            tokens = [positions[index] for index in coded.tokens[at]]
            return [[tokens.pop(0) for _ in range(size)] for size in made]

        old = pages(first.coded, list(range(PROMPT)), MADE[0][layer][head])
        assert held[0].coded[at].tolist() == sum(old, [])
        assert held[0].sizes[at].tolist() == [len(page) for page in old]
        resident = [*first.survivors[at].tolist(), *range(PROMPT, PROMPT + 16)]
        new = pages(second.coded, resident, MADE[1][layer][head])
        new += [old[page] for page in STAY[1][layer][head]]
        assert held[1].coded[at].tolist() == sum(new, [])
        assert held[1].sizes[at].tolist() == [len(page) for page in new]
        assert held[1].exact[at].tolist() == [resident[index] for index in second.survivors[at]]


def test_a_token_is_exact_or_coded_or_gone() -> None:
    made = make(dealing="global", cold=True)
    assert not (made.exact_at_end & made.coded_at_end).any()
    # The last compaction was after 136 tokens, and four were computed since.
    assert made.exact_at_end[..., 136:].all() and made.exact_at_end.sum() == BLOCK * HOT[1].sum() + 6 * 4
    assert made.coded_at_end.sum() == 6 + 12 + 16 + 20 + 40 + 20 + 5
    assert np.array_equal(made.cold_pages(0), COLD[0]) and np.array_equal(made.cold_pages(1), COLD[1])
    assert np.array_equal(made.pages(1), HOT[1] + COLD[1])
    assert made.tiered and not make(dealing="global").tiered
    assert not make(dealing="global").coded_at_end.any()


def test_cold_pages_that_do_not_follow_are_refused() -> None:
    first, second = recording(dealing="global", cold=True).compactions
    assert second.coded is not None
    pairs = [[head.tolist() for head in layer] for layer in second.coded.stay.layers()]
    pairs[1][0] = [0]  # this head had no cold page
    wrong = Coded(second.coded.tokens, second.coded.sizes, Ragged.of(pairs))
    with pytest.raises(ValueError, match="a cold page stays that its head did not have"):
        held_after([first, replace(second, coded=wrong)], BLOCK)
    # Without its cold pages a request would hold less than the scheduler counted.
    with pytest.raises(ValueError, match=r"started from 40 resident tokens, but 29\.3333 follow"):
        held_after([replace(first, coded=None), second], BLOCK)
    with pytest.raises(ValueError, match="do not add up to those that it coded"):
        Coded(second.coded.tokens, Ragged.of(MADE[0]), second.coded.stay)
