# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A worker without a model: it stores, for every page of the pool, which tokens were written there.

It learns everything from ``SchedulerOutput``, as a real worker does, so it also checks the protocol between
scheduler and worker. A token's identity is the whole prefix that produced it; a token computed after an eviction
depends on what was evicted and gets an identity of its own, which no other request may ever find.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from vllm.v1.outputs import ModelRunnerOutput

from deltamem_vllm.dealing.cold_pages import ColdChoice, ColdPages
from deltamem_vllm.dealing.deal import deal, survivors
from deltamem_vllm.dealing.tiered import tiered_utility
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.tiers import ColdHeld

LAYERS, HEADS = 2, 2
PAIRS = LAYERS * HEADS
RATIO, LOSS = 3, 0.1
"""Tokens of a cold page beside those of a hot one, and the share of its worth that one loses there."""

Page = tuple[int, int]
"""A block and which of its pages: the one that (layer, kv head) uses where nothing is dealt."""


class Coded(NamedTuple):
    """A cold page and the identities of the tokens in it."""

    page: Page
    tokens: list[Any]


class Dealt(NamedTuple):
    """What the last compaction dealt: its serial, how many blocks, and which pages to which pair, in token order; and
    each pair's cold pages."""

    serial: int
    blocks: int
    pages: list[list[Page]]
    cold: list[list[Coded]]


class SimulatedWorker:
    """Executes scheduler outputs on symbolic tokens, for ``LAYERS`` x ``HEADS`` pairs (layer, kv head).

    Attributes
    ----------
    slots: page -> identities of the tokens stored there, by slot; more of them in cold pages.
    most_cold_pages: that all requests together held.
    """

    def __init__(self, block_size: int, seed: int) -> None:
        self._size = block_size
        self._random = random.Random(seed)
        self._draws = torch.Generator().manual_seed(seed)
        self.slots: dict[Page, dict[int, Any]] = defaultdict(dict)
        self._blocks: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}
        # Identities of the resident tokens, pair by pair.
        self._resident: dict[str, list[list[Any]]] = {}
        self._dealt: dict[str, Dealt] = {}
        self._epoch: dict[str, int] = {}
        # A prefix is named by a number: comparing tuples of tokens would take most of the time.
        self._prefixes: dict[tuple[int, int], int] = {}
        self.most_cold_pages = 0

    def execute(self, output: Any, requests: dict[str, Any]) -> ModelRunnerOutput:
        """One step; raises AssertionError when a request would read anything but its own resident tokens."""
        for gone in output.finished_req_ids | (output.preempted_req_ids or set()):
            for table in (self._blocks, self._tokens, self._resident, self._dealt):
                table.pop(gone, None)
        plans = {plan.request_id: plan for plan in output.deltamem.compactions}
        curves = {probe.request_id: self._answer(probe) for probe in output.deltamem.probes}
        for plan in output.deltamem.compactions:
            self._compact(plan)
        self._update_tables(output, plans)
        for request_id, plan in plans.items():
            if request_id in self._blocks:
                self._blocks[request_id] = list(plan.blocks_after)
        self._check_serials(output.deltamem.dealt)
        sampled = [self._run(r, n, output, requests[r]) for r, n in output.num_scheduled_tokens.items()]
        ids = list(output.num_scheduled_tokens)
        # Each layer writes the step's tokens of all requests before any of them reads.
        for request_id in ids:
            self._check_reads(request_id)
        result = ModelRunnerOutput(
            req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=sampled
        )
        result.deltamem_curves = curves  # type: ignore[attr-defined]
        result.deltamem_cold = {plan.request_id: held for plan in plans.values() if (held := self._held(plan))}  # type: ignore[attr-defined]
        return result

    def check_pages(self, owned: dict[str, list[int]]) -> int:
        """Every page of the pool has one owner at most, unless requests share a dense block.

        Parameters
        ----------
        owned: the block tables that the scheduler holds, by request; all other blocks are free, or cache entries.

        Returns
        -------
        Dealt pages in use.
        """
        owners: dict[Page, set[tuple[str, int]]] = defaultdict(set)
        private: set[Page] = set()
        for request_id, dealt in self._dealt.items():
            if request_id not in owned:
                continue  # it ended; the worker hears of it with the next step
            blocks = owned[request_id]
            target = {(block, pair) for block in blocks[: dealt.blocks] for pair in range(PAIRS)}
            cold = [coded.page for pages in dealt.cold for coded in pages]
            mine = [page for pages in dealt.pages for page in pages] + cold
            assert len(mine) == len(set(mine)), f"a page was dealt twice to {request_id}"
            assert set(mine) == target, f"{request_id} was dealt other pages than those of its blocks"
            private |= target
        cold_pages = 0
        for request_id, blocks in owned.items():
            for pair in range(PAIRS):
                own = [coded.page for coded in self._coded(request_id, pair)]
                cold_pages += len(own)
                for page in self._pages(request_id, pair, blocks) + own:
                    owners[page].add((request_id, pair))
        self.most_cold_pages = max(self.most_cold_pages, cold_pages)
        for page, who in owners.items():
            requests = {request_id for request_id, _ in who}
            assert len(who) == len(requests), f"page {page} belongs to two pairs of one request: {who}"
            assert page not in private or len(who) == 1, f"the dealt page {page} belongs to {who}"
            assert len({pair for _, pair in who}) == 1, f"page {page} belongs to different pairs: {who}"
        return len(private)

    def _update_tables(self, output: Any, plans: dict[str, Any]) -> None:
        for new in output.scheduled_new_reqs:
            self._start(new.req_id, new.block_ids[0], new.num_computed_tokens, list(new.prompt_token_ids))
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                tokens = list(cached.all_token_ids[request_id])
                self._start(request_id, blocks[0], cached.num_computed_tokens[i], tokens)
            elif blocks is not None and request_id not in plans:
                self._blocks[request_id] += blocks[0]

    def _start(self, request_id: str, blocks: list[int], computed: int, tokens: list[int]) -> None:
        self._blocks[request_id] = list(blocks)
        self._tokens[request_id] = tokens
        self._dealt.pop(request_id, None)
        self._epoch[request_id] = self._epoch.get(request_id, 0) + 1
        # A prefix hit: the blocks must hold exactly the dense KV of this prompt.
        found: list[Any] = []
        for token in tokens[:computed]:
            found.append(self._prefix(found[-1] if found else -1, token))
        self._resident[request_id] = [list(found) for _ in range(PAIRS)]

    def _prefix(self, before: int, token: int) -> int:
        return self._prefixes.setdefault((before, token), len(self._prefixes))

    def _pages(self, request_id: str, pair: int, blocks: list[int]) -> list[Page]:
        """Pages that a pair reads, in token order."""
        dealt = self._dealt.get(request_id)
        if dealt is None:
            return [(block, pair) for block in blocks]
        return dealt.pages[pair] + [(block, pair) for block in blocks[dealt.blocks :]]

    def _coded(self, request_id: str, pair: int) -> list[Coded]:
        dealt = self._dealt.get(request_id)
        return [] if dealt is None else dealt.cold[pair]

    def _held(self, plan: Any) -> ColdHeld | None:
        """What a request holds in cold pages, for the scheduler."""
        dealt = self._dealt.get(plan.request_id)
        if dealt is None or not plan.cold:
            return None
        cold = [coded for pages in dealt.cold for coded in pages]
        return ColdHeld(len(cold) / PAIRS, sum(len(coded.tokens) for coded in cold) / PAIRS)

    def _check_cold(self, request_id: str) -> None:
        for pair in range(PAIRS):
            for page, tokens in self._coded(request_id, pair):
                found = [self.slots[page].get(i) for i in range(len(tokens))]
                assert found == tokens, f"a cold page of {request_id} was overwritten"

    def _read(self, request_id: str, pair: int, blocks: list[int]) -> list[Any]:
        pages, size = self._pages(request_id, pair, blocks), self._size
        count = len(self._resident[request_id][pair])
        return [self.slots[pages[i // size]].get(i % size) for i in range(count)]

    def _compact(self, plan: Any) -> None:
        request_id, old = plan.request_id, self._resident[plan.request_id]
        source = list(plan.source_blocks)
        nominal = len(old[0]) - self._surplus(request_id, 0)
        assert nominal == plan.resident_before, "the scheduler counts other tokens than the worker holds"
        for pair in range(PAIRS):
            assert self._read(request_id, pair, source) == old[pair], "a source page was overwritten before its use"
        self._check_cold(request_id)
        whole = plan.keep // self._size
        stay: list[list[Coded]] = [[] for _ in range(PAIRS)]
        coded: list[list[list[Any]]] = [[] for _ in range(PAIRS)]
        if plan.dealing == "equal":
            kept = [self._choose(tokens, plan.keep, plan) for tokens in old]
        elif plan.cold:
            kept, coded, stay = self._deal_tiers(plan, old)
        else:
            counts = [n * self._size for n in self._deal(plan, [len(tokens) for tokens in old])]
            kept = [self._choose(tokens, count, plan) for tokens, count in zip(old, counts, strict=True)]
        hot = [whole if plan.dealing == "equal" else len(tokens) // self._size for tokens in kept]
        targets = self.deal_pages(plan, hot + [len(coded[pair]) + len(stay[pair]) for pair in range(PAIRS)])
        for tokens, pages in zip(kept, targets, strict=False):
            for j, identity in enumerate(tokens):
                self.slots[pages[j // self._size]][j % self._size] = identity
        cold: list[list[Coded]] = []
        for pair in range(PAIRS):
            written = coded[pair] + [page.tokens for page in stay[pair]]
            cold.append([Coded(*one) for one in zip(targets[PAIRS + pair], written, strict=True)])
            for page, tokens in cold[-1]:
                self.slots[page] = dict(enumerate(tokens))
        self._resident[request_id] = kept
        if plan.dealing == "equal":
            self._dealt.pop(request_id, None)
        else:
            self._dealt[request_id] = Dealt(plan.serial, len(plan.target_blocks), targets[:PAIRS], cold)

    def _answer(self, probe: Any) -> UtilityCurve:
        """Any curve will do; the probe must describe what the worker holds."""
        resident = self._resident[probe.request_id]
        nominal = len(resident[0]) - self._surplus(probe.request_id, 0)
        assert nominal == probe.resident_len, "the scheduler probes other tokens than the worker holds"
        for pair in range(PAIRS):
            assert self._read(probe.request_id, pair, list(probe.source_blocks)) == resident[pair], "a stale probe"
        self._check_cold(probe.request_id)
        floor = max(-(-(probe.sink_tokens + probe.recent_tokens) // self._size), 1)
        blocks = range(floor, max(nominal // self._size, floor) + 1)
        mass = sorted(self._random.random() for _ in blocks[:-1])
        return UtilityCurve(tuple(blocks), (*mass, 1.0))

    def _surplus(self, request_id: str, pair: int) -> int:
        """Tokens that a pair holds more than its request does nominally."""
        dealt = self._dealt.get(request_id)
        return 0 if dealt is None else (len(dealt.pages[pair]) - dealt.blocks) * self._size

    def _deal(self, plan: Any, lengths: list[int]) -> list[int]:
        """Pages of each pair, for utilities that differ wildly from pair to pair."""
        whole = torch.tensor([n // self._size for n in lengths])
        utility = torch.rand(PAIRS, int(whole.max()), generator=self._draws).sort(descending=True).values
        utility *= torch.rand(PAIRS, 1, generator=self._draws) ** 4
        utility[torch.arange(utility.shape[1]) >= whole.unsqueeze(1)] = float("-inf")
        floor = max(-(-(plan.sink_tokens + plan.recent_tokens) // self._size), 1)
        pages = deal(utility.view(LAYERS, HEADS, -1), self._size, len(plan.target_blocks), floor)
        return [int(n) for n in pages.flatten()]

    def _deal_tiers(
        self, plan: Any, old: list[list[Any]]
    ) -> tuple[list[list[Any]], list[list[list[Any]]], list[list[Coded]]]:
        """Of each pair: its tokens that stay hot, those of its new cold pages, and its cold pages that stay."""
        lengths = torch.tensor([len(tokens) for tokens in old]).view(LAYERS, HEADS)
        scores = self._scores((LAYERS, HEADS, int(lengths.max())))
        capacity, before = RATIO * self._size, [self._coded(plan.request_id, pair) for pair in range(PAIRS)]
        counts = torch.tensor([len(pages) for pages in before]).view(LAYERS, HEADS)
        tokens = torch.zeros(LAYERS, HEADS, int(counts.max()), dtype=torch.int64)
        for pair, pages in enumerate(before):
            tokens.flatten(0, 1)[pair, : len(pages)] = torch.tensor([len(page.tokens) for page in pages])
        rated = tiered_utility(
            scores,
            lengths,
            ColdPages(counts, tokens.int(), tokens, None),
            self._scores((*tokens.shape, capacity)),
            lambda live, ends: live,
            self._size,
            capacity,
            LOSS,
            plan.sink_tokens,
            plan.recent_tokens,
        )
        hot, choice = rated.choose(len(plan.target_blocks), capacity, self._size)
        keep = survivors(rated.order, hot, self._size).flatten(0, 1)
        kept = [[own[int(i)] for i in keep[pair].nonzero()] for pair, own in enumerate(old)]
        return kept, _new_pages(choice, old), _staying(choice, before)

    def _scores(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Scores that differ wildly from pair to pair."""
        own = torch.rand(LAYERS, HEADS, *(1,) * (len(shape) - 2), generator=self._draws) ** 4
        return torch.rand(shape, generator=self._draws) ** 3 * own

    def _choose(self, tokens: list[Any], count: int, plan: Any) -> list[Any]:
        middle = range(plan.sink_tokens, len(tokens) - plan.recent_tokens)
        chosen = self._random.sample(middle, count - plan.sink_tokens - plan.recent_tokens)
        recent = range(len(tokens) - plan.recent_tokens, len(tokens))
        kept = sorted({*range(plan.sink_tokens), *chosen, *recent})
        assert len(kept) == count
        return [tokens[i] for i in kept]

    def deal_pages(self, plan: Any, counts: list[int]) -> list[list[Page]]:
        """So many pages for each pair, then for its cold tokens; in any order, as a worker is free to choose."""
        if plan.dealing == "equal":
            return [[(block, pair) for block in plan.target_blocks] for pair in range(PAIRS)] + [[]] * PAIRS
        pages = [(block, pair) for block in plan.target_blocks for pair in range(PAIRS)]
        self._random.shuffle(pages)
        targets = [[pages.pop() for _ in range(count)] for count in counts]
        assert pages == [], "pages are left over"
        return targets

    def _check_serials(self, dealt: dict[str, int]) -> None:
        found = {request_id: held.serial for request_id, held in self._dealt.items()}
        assert found == dealt, "scheduler and worker disagree about the last compaction of a request"

    def _run(self, request_id: str, count: int, output: Any, request: Any) -> list[int]:
        evicted = output.deltamem.evicted.get(request_id, 0)
        tokens, resident, blocks = (t[request_id] for t in (self._tokens, self._resident, self._blocks))
        end = request.num_computed_tokens  # vLLM has already advanced it
        first = end - count
        for pair in range(PAIRS):
            held = len(resident[pair]) - self._surplus(request_id, pair)
            assert held == first - evicted, "resident and logical lengths disagree"
        tables = [self._pages(request_id, pair, blocks) for pair in range(PAIRS)]
        for position in range(first, end):
            if evicted:
                identity: Any = (request_id, self._epoch[request_id], position)
            else:
                identity = self._prefix(resident[0][-1] if position else -1, tokens[position])
            where = position - evicted
            for pair in range(PAIRS):
                # Writes go through vLLM's own block table: the tail is the same for every pair.
                page = (blocks[where // self._size], pair)
                assert tables[pair][len(resident[pair]) // self._size] == page, "the tail is not where writes go"
                self.slots[page][where % self._size] = identity
                resident[pair].append(identity)
        if end < len(tokens):
            return []
        token = self._random.randrange(1000)
        tokens.append(token)
        return [token]

    def _check_reads(self, request_id: str) -> None:
        for pair, expected in enumerate(self._resident[request_id]):
            found = self._read(request_id, pair, self._blocks[request_id])
            assert found == expected, f"{request_id} would read tokens that are not its own"
        self._check_cold(request_id)


def _new_pages(choice: ColdChoice, old: list[list[Any]]) -> list[list[list[Any]]]:
    """The tokens of each pair's new cold pages."""
    made: list[list[list[Any]]] = [[] for _ in old]
    for pair, tokens, count in zip(choice.pair.tolist(), choice.tokens.tolist(), choice.counts.tolist(), strict=True):
        made[pair].append([old[pair][i] for i in tokens[:count]])
    return made


def _staying(choice: ColdChoice, before: list[list[Coded]]) -> list[list[Coded]]:
    """Each pair's cold pages that stay."""
    assert choice.stay is not None
    stay = choice.stay.flatten(0, 1).tolist()
    return [
        [page for page, stays in zip(pages, own, strict=False) if stays]
        for pages, own in zip(before, stay, strict=True)
    ]
