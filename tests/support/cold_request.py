# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A request that a dealer compacts in a small pool, and beside it plain lists of what every head must hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
from deltamem_vllm.memory.plans import CompactionPlan
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import make_layout
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
