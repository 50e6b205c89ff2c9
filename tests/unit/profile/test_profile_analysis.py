# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Ranks, shares and masses of `deltamem profile`, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from deltamem_vllm.evaluation.profile.analysis import (
    bin_tokens,
    bin_width,
    deal,
    equal_split,
    held_mass,
    rank_in_head,
)
from tests.support.profile_toy import PROMPT, RECENT, SINKS, recording, survivors


@pytest.mark.parametrize("distinct", [1000, 3])
def test_one_ranking_over_all_heads_against_brute_force(distinct: int) -> None:
    utility = np.random.default_rng(1).integers(0, distinct, (3, 2, 30)).astype(np.float32)
    held = deal(utility, 10, SINKS, RECENT)
    entries = [(layer, head, token) for layer in range(3) for head in range(2) for token in range(30)]
    free = [e for e in entries if SINKS <= e[2] < 30 - RECENT]
    free.sort(key=lambda e: (-utility[e], -e[2], e[0], e[1]))
    expected = {e for e in entries if e not in free} | set(free[: 3 * 2 * (10 - SINKS - RECENT)])
    assert {tuple(e) for e in np.argwhere(held)} == expected
    assert held.sum() == 3 * 2 * 10


def test_dealing_moves_memory_to_the_head_that_needs_it() -> None:
    utility = np.zeros((2, 1, 20), dtype=np.float32)
    utility[1] = 1
    assert deal(utility, 10, 1, 1).sum(2).tolist() == [[2], [18]]
    assert deal(np.where(utility == 1, np.nan, utility), 10, 1, 1).sum(2).tolist() == [[18], [2]]


def test_dealing_needs_room_for_the_protected() -> None:
    with pytest.raises(ValueError, match=r"keep must be 6 \(protected\) to 20 \(resident\), got 5"):
        deal(np.zeros((1, 1, 20)), 5, 2, 4)


def test_one_ranking_holds_the_most_utility_of_all_ways_with_equal_memory() -> None:
    made = recording()
    dealt = deal(made.utility, 24, SINKS, RECENT)
    equal = made.compactions[0].survivors.mask(PROMPT)
    assert dealt.sum() == equal.sum()
    assert made.utility[dealt].sum() > made.utility[equal].sum()


@pytest.mark.parametrize("distinct", [1000, 3])
def test_the_equal_split_is_the_engines_choice(distinct: int) -> None:
    utility = np.random.default_rng(1).integers(0, distinct, (3, 2, 30)).astype(np.float32)
    utility[0, 0, ::3] = np.nan
    held = equal_split(utility, 10, SINKS, RECENT)
    chosen = survivors(utility.reshape(-1, 30), np.full((3, 2), 10))
    assert np.array_equal(held, chosen.mask(30))
    with pytest.raises(ValueError, match="got 31"):
        equal_split(utility, 31, SINKS, RECENT)


def test_held_mass() -> None:
    weights = np.array([[[1.0, 2.0, 5.0]], [[0.0, 0.0, 0.0]]])
    held = np.array([[[True, False, True]], [[False, False, True]]])
    assert held_mass(weights, held).tolist() == [[0.75], [1.0]]
    with pytest.raises(ValueError, match="weights >= 0"):
        held_mass(-weights, held)


def test_ranks_within_a_head() -> None:
    ranks = rank_in_head(np.array([[[5.0, 1.0, 3.0]], [[2.0, 2.0, 9.0]]]))
    assert ranks.tolist() == [[[1.0, 0.0, 0.5]], [[0.25, 0.25, 1.0]]]


@pytest.mark.parametrize("tokens", [1, 7, 8192])
def test_bins_hold_every_token_once(tokens: int) -> None:
    values = np.random.default_rng(0).random((2, tokens))
    width = bin_width(tokens, 100)
    assert -(-tokens // width) <= 100
    parts = [values[:, i : i + width] for i in range(0, tokens, width)]
    assert np.allclose(bin_tokens(values, width, "mean"), np.stack([p.mean(1) for p in parts], 1))
    assert np.array_equal(bin_tokens(values, width, "max"), np.stack([p.max(1) for p in parts], 1))
