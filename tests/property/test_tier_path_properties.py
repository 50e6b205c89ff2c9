# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Splits of a pair's pages and the dealing of any pages against their slow definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamem_vllm.dealing import reference
from deltamem_vllm.dealing.deal import deal_pages
from deltamem_vllm.dealing.tiers import tier_path
from tests.property.test_tier_properties import LOSSES, MASSES, QUICK, capacities, numbers


@QUICK
@given(st.data(), LOSSES)
def test_splits_are_the_best_there_are(data: st.DataObject, loss: float) -> None:
    """Exactly: what `tier_path` searches bends downwards, so the only top is the highest. Float64 rounds it."""
    layers, heads, size = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    capacity, floor = data.draw(capacities(size)), data.draw(st.integers(0, 2))
    least = max(floor * size, 1)
    lengths = torch.tensor([[data.draw(st.integers(least, least + 40)) for _ in range(heads)] for _ in range(layers)])
    worth = numbers(data.draw, MASSES, (layers, heads, int(lengths.max()) + data.draw(st.integers(0, 3))))
    # Protected tokens stand first, whatever they are worth.
    worth[..., floor * size :] = worth[..., floor * size :].sort(dim=2, descending=True).values
    path = tier_path(worth, lengths, size, capacity, loss, floor)
    assert path.gains.dtype == torch.float32 and path.gains[..., :floor].eq(math.inf).all()
    for layer, head in torch.cartesian_prod(*map(torch.arange, lengths.shape)).view(-1, 2).tolist():
        own = worth[layer, head, : lengths[layer, head]].tolist()
        gains, hot = path.gains[layer, head].tolist(), path.hot[layer, head].tolist()
        ways = [reference.splits(own, n, size, capacity, loss, floor) for n in range(len(hot))]
        last = -(-len(own) // size)
        assert [bool(way) for way in ways] == [floor <= n <= last for n in range(len(hot))]
        assert [gain > -math.inf for gain in gains] == [n < last for n in range(len(gains))]
        for n in range(floor, last + 1):
            best = max(ways[n].values())
            assert hot[n] in ways[n], "a cold page without a token, or a hot one that is not full"
            assert ways[n][hot[n]] == pytest.approx(best, rel=1e-9, abs=1e-12)
            if n > floor:
                before = max(ways[n - 1].values())
                assert gains[n - 1] == pytest.approx(best - before, rel=1e-6, abs=1e-6 * best)
            if loss == 1:
                assert hot[n] == max(ways[n]), "what is coded is worth nothing"
            if loss == 0:
                held = {h: sum(own[: min(len(own), h * size + (n - h) * capacity)]) for h in ways[n]}
                assert held[hot[n]] == pytest.approx(max(held.values())), "only what is held matters"


@QUICK
@given(st.data(), st.integers(1, 2), st.integers(1, 3), st.integers(1, 8))
def test_pages_are_dealt_by_the_greedy_definition(data: st.DataObject, layers: int, heads: int, count: int) -> None:
    worth = torch.tensor(
        data.draw(
            st.lists(
                st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.0, 2.0, 9.0]),
                min_size=layers * heads * count,
                max_size=layers * heads * count,
            )
        )
    ).view(layers, heads, count)
    supply = torch.tensor(
        data.draw(st.lists(st.integers(0, count), min_size=layers * heads, max_size=layers * heads))
    ).view(layers, heads, 1)
    must = torch.minimum(supply, torch.tensor(data.draw(st.integers(0, 2))))
    index = torch.arange(count)
    worth = worth.masked_fill(index < must, math.inf).masked_fill(index >= supply, -math.inf)
    wanted = data.draw(st.integers(0, int(supply.sum())))
    assert torch.equal(deal_pages(worth, wanted), reference.deal_pages(worth, wanted))
