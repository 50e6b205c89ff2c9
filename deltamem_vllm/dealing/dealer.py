# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Deals the pages of one request: rate its tokens, share the pages out, move the survivors."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.dealing.deal import RankedPages, curve, deal, page_mass, page_utilities, survivors
from deltamem_vllm.dealing.prior import HeadPrior, combine
from deltamem_vllm.dealing.rated import Rated, of_survivors, with_tail
from deltamem_vllm.dealing.redundancy import discount_repeats
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.memory.budgets import cdiv
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.plans import CompactionPlan, Probe
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.scoring.base import Scorer, ScoreView
from deltamem_vllm.scoring.seen import Seen
from deltamem_vllm.scoring.window import ObservationWindow

# Survivors moved at a time when the copy is out of place: bounds the scratch memory (with D = 128 in bf16: 256 MiB).
_TOKENS_AT_A_TIME = 1 << 19

# Numbers of a key that a CPU rates at a time: intermediate results then stay in its cache, where larger ones would cost
# more in fresh memory than in arithmetic (three heads of 1024 tokens: 2.9 ms together, 1.4 ms one by one).
_NUMBERS_IN_CACHE = 1 << 16

# Entries that may stay rated between a probe and the compaction that follows it (about 16 bytes each).
_MOST_RATED = 1 << 24


@dataclass(frozen=True)
class Valued:
    """A request's resident tokens and what they are worth.

    Attributes
    ----------
    pages: ``[L, H, W]`` int32 page numbers in token order.
    ranked: tokens of each pair, best first, in whole pages.
    utility: ``[L, H, P]`` float32, of those pages, comparable across pairs.
    weight: ``[L, H]`` what a pair is worth as a whole; None where all pairs are alike.
    scores, lengths: ``[L, H, N]`` as the scorer gave them, ``[L, H]`` tokens of each pair.
    floor: pages that every pair gets.
    seen: over all that was ever rated; None where scores do not last.
    """

    pages: Tensor
    ranked: RankedPages
    utility: Tensor
    weight: Tensor | None
    scores: Tensor
    lengths: Tensor
    floor: int
    seen: Seen | None


class Dealer:
    """Shares pages among the (layer, kv head) pairs of this rank.

    Parameters
    ----------
    tables: where every request's pages are; told of the new ones.
    mover: reads and writes tokens in pages.
    scales: each layer's factor on q . k.
    window: recorded queries; None if no scorer needs any.
    prior: the model's head profile on this rank; None without a calibration.
    redundancy: similarity from which a token repeats another; 0 turns the discount off.
    seed: of the policy.

    Attributes
    ----------
    scoring_seconds: time spent on scoring so far.
    """

    def __init__(
        self,
        tables: PageTables,
        mover: DealtPages,
        scales: Sequence[float],
        window: ObservationWindow | None,
        prior: HeadPrior | None,
        redundancy: float,
        seed: int,
    ) -> None:
        self.tables = tables
        self._mover = mover
        self._scales = scales
        self._window = window
        self._prior = prior
        self._redundancy = redundancy
        self._seed = seed
        self.scoring_seconds = 0.0
        # By all that makes a rating that of a compaction: one of other blocks would move the wrong tokens.
        self._rated: dict[tuple[str, tuple[int, ...], int], Valued] = {}

    @torch.inference_mode()
    def run(self, plan: CompactionPlan, scorer: Scorer) -> Tensor:
        """Carry out a compaction.

        Returns
        -------
        ``[L, H, N]`` bool: the resident tokens that each pair kept.
        """
        pool = self.tables.pool
        valued = self._rated.pop((plan.request_id, tuple(plan.source_blocks), plan.resident_before), None)
        if valued is None:
            valued = self._value(plan, plan.source_blocks, plan.resident_before, scorer)
        budget = len(plan.target_blocks)
        counts = deal(valued.utility, pool.block_size, budget, valued.floor)
        keep = survivors(valued.ranked.order, counts, pool.block_size)
        target = pool.ids(torch.tensor(plan.target_blocks, device=pool.device)).flatten().long()
        self._move(valued.pages, keep, target, plan.in_place)
        rated = None
        if valued.seen is not None:
            widest = int(counts.max()) * pool.block_size
            rated = of_survivors(scorer.name, valued.scores, keep, valued.seen, widest)
        self.tables.put(plan.request_id, plan.serial, budget, counts, target, rated)
        return keep

    @torch.inference_mode()
    def probe(self, probe: Probe, scorer: Scorer) -> UtilityCurve:
        """What the request would retain with fewer and fewer blocks. Reads a few numbers back from the device.

        The order in which pages are given up is that of dealing. What is lost with a page is its share of what the
        scorer sees in its pair, weighted with what the pair is worth: so an easy prompt, in which few tokens have most
        of the mass, has a steeper curve than a dense one, also where a calibration alone decides the pages.
        """
        valued = self._value(probe, probe.source_blocks, probe.resident_len, scorer)
        if probe.compacted_next and valued.scores.numel() + self._rated_entries() <= _MOST_RATED:
            self._rated[probe.request_id, tuple(probe.source_blocks), probe.resident_len] = valued
        size, sink, recent = self.tables.pool.block_size, probe.sink_tokens, probe.recent_tokens
        mass = page_mass(valued.scores, valued.lengths, valued.ranked.order, size, sink, recent)
        if valued.weight is not None:
            mass = mass * valued.weight.unsqueeze(2)
        return UtilityCurve(*curve(valued.utility, valued.floor, mass))

    def _rated_entries(self) -> int:
        return sum(valued.scores.numel() for valued in self._rated.values())

    def _value(self, request: CompactionPlan | Probe, blocks: Sequence[int], resident: int, scorer: Scorer) -> Valued:
        began = time.perf_counter()
        pool = self.tables.pool
        pages, lengths = self.tables.source(request.request_id, blocks, resident)
        scores, seen = self._scores(request.request_id, pages, lengths, scorer)
        on_device = lengths.to(pool.device)
        ranked = page_utilities(scores, on_device, pool.block_size, request.sink_tokens, request.recent_tokens)
        live = ranked.utility if request.dealing == "global" and scorer.comparable else None
        prior = None
        if self._prior is not None and (scorer.profiled or live is None):
            count = ranked.utility.shape[2]
            prior = self._prior.pages(request.logical_len, pool.block_size, count, on_device)
        source = prior if prior is not None else live
        weight = None if source is None else source.clamp(min=0.0).sum(2)
        if live is None and prior is None:
            # Nothing says that one pair deserves more than another: all get the same.
            rank = torch.arange(ranked.utility.shape[2], 0, -1, device=pool.device, dtype=torch.float32)
            live = rank.expand_as(ranked.utility).masked_fill(ranked.utility == float("-inf"), float("-inf"))
        utility = combine(live, prior)
        self.scoring_seconds += time.perf_counter() - began
        floor = max(cdiv(request.sink_tokens + request.recent_tokens, pool.block_size), 1)
        return Valued(pages, ranked, utility, weight, scores, on_device, floor, seen)

    def _scores(self, request_id: str, pages: Tensor, lengths: Tensor, scorer: Scorer) -> tuple[Tensor, Seen | None]:
        """Scores of every resident token, ``[L, H, N]``, and what was seen; N is the longest pair's length."""
        known = self._known(request_id, scorer)
        if known is None:
            # Heads that hold different numbers of tokens have lost some: what is left does not tell what was usual.
            lasting = scorer.lasting and self._redundancy == 0 and request_id not in self.tables.requests
            return self._rate(request_id, pages, lengths, scorer, None, lasting)
        dealt, size = self.tables.requests[request_id], self.tables.pool.block_size
        counts = dealt.counts * size
        tail = lengths - counts.to(lengths.device)  # the same for all pairs
        new = int(tail[0, 0])
        if not new:
            return known.scores, known.seen
        column = dealt.counts.unsqueeze(2) + torch.arange(cdiv(new, size), device=pages.device)
        scores, seen = self._rate(request_id, pages.gather(2, column), tail, scorer, known.seen, True)
        return with_tail(known, counts, scores), seen

    def _known(self, request_id: str, scorer: Scorer) -> Rated | None:
        """What the dealt tokens were rated, if that still holds."""
        dealt = self.tables.requests.get(request_id)
        rated = None if dealt is None else dealt.rated
        return rated if rated is not None and rated.scorer == scorer.name else None

    def _rate(
        self, request_id: str, pages: Tensor, lengths: Tensor, scorer: Scorer, before: Seen | None, lasting: bool
    ) -> tuple[Tensor, Seen | None]:
        """Scores of the tokens in these pages, ``[L, H, N]``, and what has been seen: ``before``, and they.

        Scores that are to last need lengths that are all alike; for others nothing is summed up.
        """
        pool = self.tables.pool
        rows = self._window.rows(request_id) if scorer.needs_queries and self._window is not None else None
        scores = torch.full((pool.layers, pool.heads, int(lengths.max())), float("-inf"), device=pool.device)
        seen: list[Seen] = []
        for layer in range(pool.layers):
            queries = None
            if rows is not None:
                assert self._window is not None, "rows come from it"
                queries = self._window.rings[layer].index_select(0, rows).transpose(0, 1)
            tokens = lengths[layer].tolist()
            # A copy a head would be many small ones; the layer's heads are read at once, shorter ones padded.
            keys, values = self._mover.read(pool.flat, pages[layer], tokens)
            group = queries.shape[0] // pool.heads if queries is not None else 0
            for own in _rated_together(tokens, keys.shape[2] if pool.device.type == "cpu" else 0):
                part = None if queries is None else queries[own.start * group : own.stop * group]
                count = tokens[own.start]
                view = (keys[own, :count], values[own, :count], part)
                so_far = None
                if lasting:
                    now = Seen.of(keys[own, :count], values[own, :count])
                    so_far = now if before is None else before[layer][own] + now
                    seen.append(so_far)
                scores[layer, own, :count] = self._score(layer, own.start, *view, scorer, so_far)
        return scores, Seen.joined(seen, pool.layers) if lasting else None

    def _score(
        self,
        layer: int,
        head: int,
        keys: Tensor,
        values: Tensor,
        queries: Tensor | None,
        scorer: Scorer,
        seen: Seen | None,
    ) -> Tensor:
        """Scores of the tokens of the heads from ``head`` on, ``[heads, n]``; keys and values ``[heads, n, D]``."""
        count = keys.shape[1]
        if queries is not None and queries.shape[1] > count:
            queries = queries[:, queries.shape[1] - count :]  # a pair may hold fewer tokens than the window has queries
        view = ScoreView(keys, values, queries, self._scales[layer], layer, self._seed, head, seen)
        scores = scorer.score(view)
        return discount_repeats(scores, keys, values, self._redundancy) if self._redundancy > 0 else scores

    def _move(self, pages: Tensor, keep: Tensor, target: Tensor, in_place: bool) -> None:
        """Survivors of the first pair fill the first target pages, then the second pair's, and so on."""
        pool, size = self.tables.pool, self.tables.pool.block_size
        count = target.shape[0] * size
        where = torch.nonzero_static(keep.flatten(), size=count).squeeze(1)
        pair, token = where // keep.shape[2], where % keep.shape[2]
        page = pages.flatten(0, 1)[pair, token // size].long()
        slot = token % size
        if in_place:  # a page may be a source and a target: read all before anything is written
            self._mover.scatter(pool.flat, target, *self._mover.gather(pool.flat, page, slot))
            return
        for start in range(0, count, _TOKENS_AT_A_TIME):
            part = slice(start, start + _TOKENS_AT_A_TIME)
            keys, values = self._mover.gather(pool.flat, page[part], slot[part])
            self._mover.scatter(pool.flat, target[start // size : (start + _TOKENS_AT_A_TIME) // size], keys, values)


def _rated_together(tokens: Sequence[int], width: int) -> Iterator[slice]:
    """Runs of heads with equally many tokens, on a CPU (``width`` numbers a key, else 0) no more than fit its cache."""
    start = 0
    for end in range(1, len(tokens) + 1):
        large = (end + 1 - start) * tokens[start] * width > _NUMBERS_IN_CACHE
        if end == len(tokens) or tokens[end] != tokens[start] or large:
            yield slice(start, end)
            start = end
