# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A dealer that may code tokens, over several compactions: every token is where it was said to be, or gone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltamem_vllm.dealing.prior import HeadPrior
from deltamem_vllm.memory.plans import Probe
from deltamem_vllm.ops.inputs import LAYOUTS
from tests.support.cold_request import (
    HEADS,
    LAYERS,
    RECENT,
    SINK,
    SIZE,
    KeyLength,
    LastingKeyLength,
    Request,
    WithinHeads,
)

ROUNDS = [(93, 6), (13, 5), (SIZE, 5), (3 * SIZE + 1, 6)]
"""Tokens that are written, blocks that are kept."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("scorer", [KeyLength, LastingKeyLength])
def test_every_token_is_where_it_was_said_to_be(layout: str, dtype: torch.dtype, bits: int, scorer: type) -> None:
    request, stayed, made = Request(dtype, bits, layout), 0, []
    for turn, (tokens, keep) in enumerate(ROUNDS):
        request.write(tokens)
        moved = request.compact(request.plan(keep, in_place=turn % 2 == 1), scorer())
        request.check(scorer.lasting)
        assert moved.cold is not None
        stayed += 0 if moved.cold.stay is None else int(moved.cold.stay.sum())
        made.append(int(moved.cold.made.sum()))
    assert made[0] > 0 and sum(made[1:]) > 0 and stayed > 0, "nothing of what this is about took place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scorer", [KeyLength, LastingKeyLength])
def test_in_place_is_out_of_place(dtype: torch.dtype, scorer: type) -> None:
    apart, packed = Request(dtype), Request(dtype)
    for tokens, keep in ROUNDS:
        for request in (apart, packed):
            request.write(tokens)
            request.compact(request.plan(keep, in_place=request is packed), scorer())
            request.check(scorer.lasting)
        for one, other in zip(sum(apart.pairs, []), sum(packed.pairs, []), strict=True):
            assert all(
                torch.equal(a, b) for x, y in zip(one.hot, other.hot, strict=True) for a, b in zip(x, y, strict=True)
            )
            assert all(torch.equal(a.raw, b.raw) for a, b in zip(one.cold, other.cold, strict=True))


def test_what_lasts_is_not_rated_again() -> None:
    request, scorer = Request(), LastingKeyLength()
    for tokens, keep in ROUNDS:
        request.write(tokens)
        scorer.tokens = 0
        request.compact(request.plan(keep, in_place=False), scorer)
        assert scorer.tokens == LAYERS * HEADS * tokens


def test_what_does_not_last_is_rated_as_it_is_read_back() -> None:
    request, scorer = Request(), KeyLength()
    for tokens, keep in ROUNDS[:2]:
        request.write(tokens)
        held = [len(pair.hot) + sum(len(page.tokens) for page in pair.cold) for pair in sum(request.pairs, [])]
        scorer.tokens = 0
        request.compact(request.plan(keep, in_place=False), scorer)
        assert scorer.tokens == sum(held)


@pytest.mark.parametrize("compacted_next", [True, False])
@pytest.mark.parametrize("scorer", [KeyLength, LastingKeyLength])
def test_a_probe_changes_nothing_but_the_work(compacted_next: bool, scorer: type) -> None:
    plain, probed = Request(), Request()
    for tokens, keep in ROUNDS:
        for request in (plain, probed):
            request.write(tokens)
        plan, same = plain.plan(keep, in_place=False), probed.plan(keep, in_place=False)
        curve = probed.dealer.probe(
            Probe(
                "r", same.source_blocks, same.resident_before, same.logical_len, SINK, RECENT, "key-length", "global",
                cold=True, compacted_next=compacted_next,
            ),
            scorer(),
        )  # fmt: skip
        assert curve.blocks[0] == 1 and curve.held == -(-same.resident_before // SIZE) and curve.retained == 1.0
        plain.compact(plan, scorer())
        probed.compact(same, scorer())
        assert torch.equal(plain.pool.flat.view(torch.uint8), probed.pool.flat.view(torch.uint8))


def test_pages_that_are_no_longer_cold_are_wiped() -> None:
    """Their bytes may be NaN as numbers, and a tail page is read as a whole."""
    request = Request()
    for tokens, keep in ROUNDS:
        request.write(tokens)
        before = request.tables.requests.get("r")
        request.compact(request.plan(keep, in_place=False), KeyLength())
        if before is not None and before.cold is not None:
            assert request.pool.flat[before.cold.numbers.long()].eq(0).all()
    cold = request.tables.requests["r"].cold
    assert cold is not None and cold.total
    request.dealer.forget({"another"})
    assert request.pool.flat[cold.numbers.long()].eq(0).all() and "r" not in request.tables.requests


def profile(equal: bool) -> HeadPrior:
    table = torch.linspace(1, 0.1, 16).expand(LAYERS, HEADS, 16)
    return HeadPrior(table if equal else table * torch.tensor([[4.0, 1.0], [1.0, 0.2]]).unsqueeze(2))


@pytest.mark.parametrize("prior", [None, profile(equal=True)], ids=["alone", "even calibration"])
def test_scores_that_compare_nothing_across_heads_give_all_heads_the_same(prior: HeadPrior | None) -> None:
    request = Request(prior=prior)
    for tokens, keep in ROUNDS:
        request.write(tokens)
        request.compact(request.plan(keep, in_place=False), WithinHeads())
        request.check(lasting=False)
        if request.serial == 1:
            dealt = request.tables.requests["r"]
            assert dealt.cold is not None and dealt.cold.counts.unique().numel() == dealt.counts.unique().numel() == 1
            assert dealt.cold.total


def test_a_calibration_deals_for_scores_that_compare_nothing() -> None:
    request = Request(prior=profile(equal=False))
    for tokens, keep in ROUNDS:
        request.write(tokens)
        request.compact(request.plan(keep, in_place=False), WithinHeads())
        request.check(lasting=False)
        pages = [len(pair.hot) // SIZE + len(pair.cold) for pair in sum(request.pairs, [])]
        assert pages[0] >= max(pages[1:3]) and min(pages[1:3]) >= pages[3] and pages[0] > pages[3]


def test_repeats_are_looked_for_among_cold_tokens_too() -> None:
    request = Request(redundancy=0.9)
    for tokens, keep in ROUNDS:
        request.write(tokens)
        request.compact(request.plan(keep, in_place=False), LastingKeyLength())
        request.check(lasting=False)


def test_a_request_that_wants_no_cold_pages_gets_none() -> None:
    with_tier, without = Request(), Request()
    without.dealer._cold = None
    moved = []
    for request in (with_tier, without):
        request.write(93)
        moved.append(request.dealer.run(replace(request.plan(6, in_place=False), cold=False), KeyLength()))
    assert moved[0].cold is None and torch.equal(moved[0].hot, moved[1].hot)
    assert torch.equal(with_tier.pool.flat.view(torch.uint8), without.pool.flat.view(torch.uint8))
