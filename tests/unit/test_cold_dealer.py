# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A dealer that may code tokens, over several compactions: every token is where it was said to be, or gone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.dealing.cold_tier import ColdTier
from deltamem_vllm.dealing.dealer import Dealer, Moved
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.prior import HeadPrior
from deltamem_vllm.dealing.rater import Rater
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.memory.plans import CompactionPlan, Probe
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import LAYOUTS, make_layout
from deltamem_vllm.scoring.base import Scorer, ScoreView

LAYERS, HEADS, SIZE, DIM, BLOCKS = 2, 2, 8, 16, 64
SINK, RECENT = 2, 3


class KeyLength(Scorer):
    """Long keys matter, whatever stands beside them."""

    name = "key-length"
    summary = "for this test"
    source = "this test"
    comparable = True

    def __init__(self) -> None:
        self.tokens = 0

    def score(self, view: ScoreView) -> Tensor:
        self.tokens += view.num_kv_heads * view.num_resident
        return view.keys_f32.norm(dim=2)


class LastingKeyLength(KeyLength):
    lasting = True


class WithinHeads(KeyLength):
    comparable = False


class Token(NamedTuple):
    key: Tensor
    value: Tensor


class Coded(NamedTuple):
    """A cold page: its bytes, and the tokens that went into it."""

    raw: Tensor
    tokens: list[Token]


@dataclass
class Pair:
    """What a (layer, kv head) must hold."""

    hot: list[Token]
    cold: list[Coded]


class Request:
    """A request and its dealer, and beside them a plain list of what every pair must hold."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        bits: int = 4,
        layout: str = "slot_major",
        loss: float = 0.1,
        prior: HeadPrior | None = None,
        redundancy: float = 0.0,
    ) -> None:
        self.random = torch.Generator().manual_seed(3)
        memory = torch.full((LAYERS, BLOCKS, HEADS, SIZE, 2 * DIM), float("nan")).to(dtype)
        self.pool = PagePool(list(memory))
        self.tables = PageTables(self.pool, max_rows=2, max_width=BLOCKS, fixed=False, cold=True)
        self.layout, self.format = (
            make_layout(layout, SIZE, DIM),
            ColdFormat(bits, DIM, SIZE * 2 * DIM * dtype.itemsize),
        )
        mover = DealtPages(self.layout)
        rater = Rater(self.tables, mover, [1.0] * LAYERS, None, redundancy, 0, self.format)
        self.dealer = Dealer(self.tables, mover, rater, prior, ColdTier(self.format, loss, self.pool, self.layout))
        self.scales = torch.rand(LAYERS, HEADS, generator=self.random) + 0.2
        self.pairs = [[Pair([], []) for _ in range(HEADS)] for _ in range(LAYERS)]
        self.free, self.blocks = list(range(BLOCKS)), list[int]()
        self.resident = self.logical = self.serial = 0

    def write(self, count: int) -> None:
        """More tokens of the request, in the slots behind its last."""
        numbers = torch.randn(count, LAYERS, HEADS, 2, DIM, generator=self.random)
        numbers[:, :, :, 0] *= torch.rand(count, LAYERS, HEADS, 1, generator=self.random) ** 3
        numbers = (numbers * self.scales[..., None, None]).to(self.pool.pages.dtype)
        for token in numbers:
            if self.resident == len(self.blocks) * SIZE:
                self.blocks.append(self.free.pop(0))
            ids = self.pool.ids(torch.tensor([self.blocks[-1]]))[..., 0]
            for layer in range(LAYERS):
                for head in range(HEADS):
                    key, value = token[layer, head]
                    page = self.pool.flat[int(ids[layer, head])]
                    page[self.layout.keys[self.resident % SIZE]] = key
                    page[self.layout.values[self.resident % SIZE]] = value
                    self.pairs[layer][head].hot.append(Token(key, value))
            self.resident += 1
            self.logical += 1

    def plan(self, keep: int, in_place: bool, dealing: str = "global") -> CompactionPlan:
        self.serial += 1
        target = self.blocks[:keep] if in_place else self.free[:keep]
        return CompactionPlan(
            "r", tuple(self.blocks), tuple(target), tuple(target), self.resident, keep * SIZE, self.logical,
            self.logical - self.resident, self.logical - keep * SIZE, SINK, RECENT, "key-length", dealing, self.serial,
            in_place, cold=True,
        )  # fmt: skip

    def compact(self, plan: CompactionPlan, scorer: Scorer) -> Moved:
        moved = self.dealer.run(plan, scorer)
        gone = [block for block in self.blocks if block not in plan.target_blocks]
        self.free = [block for block in self.free if block not in plan.target_blocks] + gone
        self.blocks, self.resident = list(plan.target_blocks), len(plan.target_blocks) * SIZE
        assert moved.cold is not None
        places = [page for layer in self.pairs for page in layer]
        made: list[list[Coded]] = [[] for _ in places]
        for pair, tokens, count in zip(moved.cold.pair, moved.cold.tokens, moved.cold.counts, strict=True):
            made[pair].append(self.coded([places[pair].hot[int(i)] for i in tokens[:count]]))
        for pair, held in enumerate(places):
            layer, head = divmod(pair, HEADS)
            stay = [] if moved.cold.stay is None else moved.cold.stay[layer, head].nonzero().flatten().tolist()
            held.cold = made[pair] + [held.cold[e] for e in stay]
            held.hot = [held.hot[int(i)] for i in moved.hot[layer, head].nonzero().flatten()]
        return moved

    def coded(self, tokens: list[Token]) -> Coded:
        parts = [torch.zeros(1, self.format.capacity, DIM, dtype=tokens[0].key.dtype) for _ in range(2)]
        for part, numbers in zip(parts, zip(*tokens, strict=True), strict=True):
            part[0, : len(tokens)] = torch.stack(numbers)
        return Coded(encode_pages(self.format, *parts, torch.tensor([len(tokens)]))[0], tokens)

    def check(self, lasting: bool) -> None:
        """The pool holds what it must, byte by byte, and every page is one pair's."""
        dealt = self.tables.requests["r"]
        pages, lengths = self.tables.source("r", self.blocks, self.resident)
        assert dealt.cold is not None and dealt.blocks == len(self.blocks)
        raw, used = self.pool.flat.view(torch.uint8), []
        for layer in range(LAYERS):
            for head in range(HEADS):
                held = self.pairs[layer][head]
                assert lengths[layer, head] == len(held.hot) == dealt.counts[layer, head] * SIZE
                for i, token in enumerate(held.hot):
                    page = self.pool.flat[int(pages[layer, head, i // SIZE])]
                    assert torch.equal(page[self.layout.keys[i % SIZE]], token.key)
                    assert torch.equal(page[self.layout.values[i % SIZE]], token.value)
                count = int(dealt.cold.counts[layer, head])
                own = dealt.cold.pages[layer, head, :count].tolist()
                assert dealt.cold.pages[layer, head, count:].eq(0).all()
                assert [int(n) for n in dealt.cold.tokens[layer, head, :count]] == [len(p.tokens) for p in held.cold]
                for page, coded in zip(own, held.cold, strict=True):
                    assert torch.equal(raw[page], coded.raw)
                    assert int(decode_pages(self.format, raw[page : page + 1])[2]) == len(coded.tokens)
                used += own + pages[layer, head, : len(held.hot) // SIZE].tolist()
                if lasting:
                    self.check_scores(layer, head)
        assert sorted(used) == sorted(self.pool.ids(torch.tensor(self.blocks)).flatten().tolist())
        assert lasting == (dealt.rated is not None) == (dealt.cold.scores is not None)

    def check_scores(self, layer: int, head: int) -> None:
        dealt, held = self.tables.requests["r"], self.pairs[layer][head]
        assert dealt.rated is not None and dealt.cold is not None and dealt.cold.scores is not None
        expected = torch.stack([token.key for token in held.hot]).float().norm(dim=1)
        scores = dealt.rated.scores[layer, head]
        torch.testing.assert_close(scores[: len(expected)], expected, rtol=1e-6, atol=0)
        assert scores[len(expected) :].eq(-torch.inf).all()
        assert dealt.rated.seen.count == self.logical
        for e, coded in enumerate(held.cold):
            # Of the tokens as they were, not as they are read back.
            expected = torch.stack([token.key for token in coded.tokens]).float().norm(dim=1)
            scores = dealt.cold.scores[layer, head, e]
            torch.testing.assert_close(scores[: len(expected)].float(), expected, rtol=2**-11, atol=1e-7)
            assert scores[len(expected) :].eq(-torch.inf).all()
        assert dealt.cold.scores[layer, head, len(held.cold) :].eq(-torch.inf).all()


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
