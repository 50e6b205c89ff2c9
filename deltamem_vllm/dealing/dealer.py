# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Deals the pages of one request: rate its tokens, share the pages out, move the survivors."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.dealing.cold_pages import ColdChoice, ColdPages
from deltamem_vllm.dealing.cold_tier import ColdTier
from deltamem_vllm.dealing.deal import RankedPages, curve, deal, page_mass, page_utilities, survivors
from deltamem_vllm.dealing.prior import HeadPrior, combine
from deltamem_vllm.dealing.rated import of_survivors
from deltamem_vllm.dealing.rater import Rater, Ratings
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.dealing.tiered import TieredUtility, tiered_utility
from deltamem_vllm.memory.budgets import cdiv
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.plans import CompactionPlan, Probe
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.scoring.base import Scorer

# Survivors moved at a time when the copy is out of place: bounds the scratch memory (with D = 128 in bf16: 256 MiB).
_TOKENS_AT_A_TIME = 1 << 19

# Entries that may stay rated between a probe and the compaction that follows it (about 16 bytes each).
_MOST_RATED = 1 << 24


@dataclass(frozen=True)
class Valued:
    """A request's resident tokens and what they are worth.

    Attributes
    ----------
    pages: ``[L, H, W]`` int32 page numbers in token order, of the hot pages.
    ratings: as the scorer gave them.
    lengths: ``[L, H]`` tokens of each pair in them.
    floor: pages that every pair gets.
    ranked: tokens of each pair, best first, in whole pages.
    utility: ``[L, H, P]`` float32, of those pages, comparable across pairs.
    weight: ``[L, H]`` what a pair is worth as a whole; None where all pairs are alike.
    tiers: what hot and cold pages are worth, in place of the last three; None if no page can be cold.
    """

    pages: Tensor
    ratings: Ratings
    lengths: Tensor
    floor: int
    ranked: RankedPages | None = None
    utility: Tensor | None = None
    weight: Tensor | None = None
    tiers: TieredUtility | None = None


@dataclass(frozen=True)
class Moved:
    """What a compaction kept of a request's resident tokens.

    Attributes
    ----------
    hot: ``[L, H, N]`` bool, of the tokens that were in hot pages, those that still are.
    cold: what of them was coded, and which cold pages stayed; None if no page can be cold.
    """

    hot: Tensor
    cold: ColdChoice | None


class Dealer:
    """Shares pages among the (layer, kv head) pairs of this rank.

    Parameters
    ----------
    tables: where every request's pages are; told of the new ones.
    mover: reads and writes tokens in hot pages.
    rater: rates tokens.
    prior: the model's head profile on this rank; None without a calibration.
    cold: makes cold pages; None if every page is hot.

    Attributes
    ----------
    scoring_seconds: time spent on scoring so far.
    """

    def __init__(
        self, tables: PageTables, mover: DealtPages, rater: Rater, prior: HeadPrior | None, cold: ColdTier | None = None
    ) -> None:
        self.tables = tables
        self._mover = mover
        self._rater = rater
        self._prior = prior
        self._cold = cold
        self.scoring_seconds = 0.0
        # By all that makes a rating that of a compaction: one of other blocks would move the wrong tokens.
        self._rated: dict[tuple[str, tuple[int, ...], int], Valued] = {}

    @torch.inference_mode()
    def run(self, plan: CompactionPlan, scorer: Scorer) -> Moved:
        """Carry out a compaction."""
        valued = self._rated.pop((plan.request_id, tuple(plan.source_blocks), plan.resident_before), None)
        if valued is None:
            valued = self._value(plan, plan.source_blocks, plan.resident_before, scorer)
        pool, budget = self.tables.pool, len(plan.target_blocks)
        target = pool.ids(torch.tensor(plan.target_blocks, device=pool.device)).flatten().long()
        choice, old = None, self._old_cold(plan.request_id)
        if valued.tiers is not None and self._cold is not None:
            counts, choice = valued.tiers.choose(budget, self._cold.layout.capacity, pool.block_size)
            keep = survivors(valued.tiers.order, counts, pool.block_size)
        else:
            assert valued.utility is not None and valued.ranked is not None, "rated without tiers"
            counts = deal(valued.utility, pool.block_size, budget, valued.floor)
            keep = survivors(valued.ranked.order, counts, pool.block_size)
        hot_target, cold = target, None
        pending: list[tuple[Tensor, Tensor]] = []
        if choice is not None and self._cold is not None:
            hot_target, cold_target = target.tensor_split([int(counts.sum())])
            # In place, a page may be a source and a target: what is cold is read before anything is written.
            cold, pending = self._cold.move(choice, old, valued.pages, valued.ratings, cold_target, plan.in_place)
        self._move(valued.pages, keep, hot_target, plan.in_place)
        if pending and self._cold is not None:
            self._cold.write(pending)
        rated = None
        if valued.ratings.seen is not None:
            widest = int(counts.max()) * pool.block_size
            rated = of_survivors(scorer.name, valued.ratings.hot, keep, valued.ratings.seen, widest)
        if old is not None and self._cold is not None:
            left = old.numbers
            self._cold.wipe(left[~torch.isin(left.long(), target)])
        self.tables.put(plan.request_id, plan.serial, budget, counts, hot_target, rated, cold)
        return Moved(keep, choice)

    def forget(self, dealt: Container[str]) -> None:
        """Drop requests that are no longer dealt: finished, aborted, preempted. Before their blocks are used again."""
        for request_id in [known for known in self.tables.requests if known not in dealt]:
            gone = self.tables.requests.pop(request_id).cold
            if gone is not None and self._cold is not None:
                self._cold.wipe(gone.numbers)

    @torch.inference_mode()
    def probe(self, probe: Probe, scorer: Scorer) -> UtilityCurve:
        """What the request would retain with fewer and fewer blocks. Reads a few numbers back from the device.

        The order in which pages are given up is that of dealing. What is lost with a page is its share of what the
        scorer sees in its pair, weighted with what the pair is worth: so an easy prompt, in which few tokens have most
        of the mass, has a steeper curve than a dense one, also where a calibration alone decides the pages. With cold
        pages it is what dealing itself compares: what the page adds.
        """
        valued = self._value(probe, probe.source_blocks, probe.resident_len, scorer)
        if probe.compacted_next and valued.ratings.hot.numel() + self._rated_entries() <= _MOST_RATED:
            self._rated[probe.request_id, tuple(probe.source_blocks), probe.resident_len] = valued
        if valued.tiers is not None:
            return UtilityCurve(*valued.tiers.curve(valued.floor))
        assert valued.utility is not None and valued.ranked is not None, "rated without tiers"
        size, sink, recent = self.tables.pool.block_size, probe.sink_tokens, probe.recent_tokens
        mass = page_mass(valued.ratings.hot, valued.lengths, valued.ranked.order, size, sink, recent)
        if valued.weight is not None:
            mass = mass * valued.weight.unsqueeze(2)
        return UtilityCurve(*curve(valued.utility, valued.floor, mass))

    def _rated_entries(self) -> int:
        return sum(valued.ratings.hot.numel() for valued in self._rated.values())

    def _old_cold(self, request_id: str) -> ColdPages | None:
        dealt = self.tables.requests.get(request_id)
        return None if dealt is None else dealt.cold

    def _value(self, request: CompactionPlan | Probe, blocks: Sequence[int], resident: int, scorer: Scorer) -> Valued:
        began = time.perf_counter()
        pool, sink, recent = self.tables.pool, request.sink_tokens, request.recent_tokens
        pages, lengths = self.tables.source(request.request_id, blocks, resident)
        ratings = self._rater.rate(request.request_id, pages, lengths, scorer)
        on_device = lengths.to(pool.device)
        floor = max(cdiv(sink + recent, pool.block_size), 1)
        worth = _Worth(self._prior, scorer, request.dealing, request.logical_len, pool.block_size)
        if self._cold is None or not request.cold:
            ranked = page_utilities(ratings.hot, on_device, pool.block_size, sink, recent)
            utility, weight = worth.of(ranked.utility, on_device)
            valued = Valued(pages, ratings, on_device, floor, ranked, utility, weight)
        else:
            tiers = tiered_utility(
                ratings.hot,
                on_device,
                self._old_cold(request.request_id),
                ratings.cold,
                lambda live, ends: worth.of(live, ends)[0],
                pool.block_size,
                self._cold.layout.capacity,
                self._cold.loss,
                sink,
                recent,
            )
            valued = Valued(pages, ratings, on_device, floor, tiers=tiers)
        self.scoring_seconds += time.perf_counter() - began
        return valued

    def _move(self, pages: Tensor, keep: Tensor, target: Tensor, in_place: bool) -> None:
        """Survivors of the first pair fill the first target pages, then the second pair's, and so on."""
        pool, size = self.tables.pool, self.tables.pool.block_size
        count = target.shape[0] * size
        where = torch.nonzero_static(keep.flatten(), size=count).squeeze(1)
        pair, token = where // keep.shape[2], where % keep.shape[2]
        page = pages.flatten(0, 1)[pair, token // size].long()
        slot = token % size
        at_once = count if in_place else _TOKENS_AT_A_TIME  # in place, all is read before anything is written
        for start in range(0, count, max(at_once, size)):
            part = slice(start, start + at_once)
            targets = target[start // size : (start + at_once) // size]
            self._mover.move(pool.flat, page[part], slot[part], targets, in_place)


@dataclass(frozen=True)
class _Worth:
    """How the live utility of ranked pages becomes comparable across pairs."""

    prior: HeadPrior | None
    scorer: Scorer
    dealing: str
    logical_len: int
    block_size: int

    def of(self, ranked: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Utility ``[L, H, P]`` of pages from the sums of their scores, and what each pair is worth ``[L, H]``."""
        live = ranked if self.dealing == "global" and self.scorer.comparable else None
        prior = None
        if self.prior is not None and (self.scorer.profiled or live is None):
            prior = self.prior.pages(self.logical_len, self.block_size, ranked.shape[2], lengths)
        source = prior if prior is not None else live
        weight = None if source is None else source.clamp(min=0.0).sum(2)
        if live is None and prior is None:
            # Nothing says that one pair deserves more than another: all get the same.
            rank = torch.arange(ranked.shape[2], 0, -1, device=ranked.device, dtype=torch.float32)
            live = rank.expand_as(ranked).masked_fill(ranked == float("-inf"), float("-inf"))
        return combine(live, prior), weight
