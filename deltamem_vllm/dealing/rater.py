# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Rates the resident tokens of one request, whichever pages they are in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.dealing.cold_pages import ColdPages, raw_bytes
from deltamem_vllm.dealing.rated import Rated, with_tail
from deltamem_vllm.dealing.redundancy import discount_repeats
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.memory.budgets import cdiv
from deltamem_vllm.ops.cold import decode_delta, read_tokens
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.page_utility import OlderTokens
from deltamem_vllm.scoring.base import Scorer, ScoreView
from deltamem_vllm.scoring.paged import PagedView, can_rate_pages, rate_pages
from deltamem_vllm.scoring.seen import Seen
from deltamem_vllm.scoring.window import ObservationWindow

# Numbers of a key that a CPU rates at a time: intermediate results then stay in its cache, where larger ones would cost
# more in fresh memory than in arithmetic (three heads of 1024 tokens: 2.9 ms together, 1.4 ms one by one).
_NUMBERS_IN_CACHE = 1 << 16


@dataclass(frozen=True)
class Ratings:
    """Scores of everything a request has in the cache.

    Attributes
    ----------
    hot: ``[L, H, N]`` float32 of the tokens in hot pages, in token order, ``-inf`` past a pair's last.
    cold: ``[L, H, E, C]`` of those in cold pages, ``-inf`` where there is none; None if no page is cold.
    seen: over all that was ever rated; None where scores do not last.
    """

    hot: Tensor
    cold: Tensor | None
    seen: Seen | None


class Rater:
    """Reads tokens out of the pool and asks a scorer.

    Parameters
    ----------
    tables: where every request's pages are.
    mover: reads tokens in hot pages.
    scales: each layer's factor on q . k.
    window: recorded queries; None if no scorer needs any.
    redundancy: similarity from which a token repeats another; 0 turns the discount off.
    seed: of the policy.
    cold: layout of cold pages; None if no page can be cold.
    """

    def __init__(
        self,
        tables: PageTables,
        mover: DealtPages,
        scales: Sequence[float],
        window: ObservationWindow | None,
        redundancy: float,
        seed: int,
        cold: ColdFormat | None,
    ) -> None:
        self._tables = tables
        self._mover = mover
        self._scales = scales
        self._window = window
        self._redundancy = redundancy
        self._seed = seed
        self._cold = cold

    def rate(self, request_id: str, pages: Tensor, lengths: Tensor, scorer: Scorer) -> Ratings:
        """Rate every resident token of a request.

        Parameters
        ----------
        pages, lengths: as of `PageTables.source`.
        """
        dealt = self._tables.requests.get(request_id)
        cold = None if dealt is None else dealt.cold
        known = self._known(request_id, scorer)
        if known is None:
            # Heads that hold different numbers of tokens have lost some: what is left does not tell what was usual.
            lasting = scorer.lasting and self._redundancy == 0 and dealt is None
            return self._rate(request_id, pages, lengths, scorer, None, lasting, cold)
        assert dealt is not None, "only dealt tokens stay rated"
        counts = dealt.counts * self._tables.pool.block_size
        tail = lengths - counts.to(lengths.device)  # the same for all pairs
        new = int(tail[0, 0])
        coded = None if cold is None else cold.scores
        if not new:
            return Ratings(known.scores, coded, known.seen)
        column = dealt.counts.unsqueeze(2) + torch.arange(cdiv(new, self._tables.pool.block_size), device=pages.device)
        fresh = self._rate(request_id, pages.gather(2, column), tail, scorer, known.seen, True, None)
        return Ratings(with_tail(known, counts, fresh.hot), coded, fresh.seen)

    def _known(self, request_id: str, scorer: Scorer) -> Rated | None:
        """What the dealt tokens were rated, if that still holds."""
        dealt = self._tables.requests.get(request_id)
        if dealt is None or dealt.rated is None or dealt.rated.scorer != scorer.name:
            return None
        return dealt.rated if dealt.cold is None or dealt.cold.scores is not None else None

    def _rate(
        self,
        request_id: str,
        pages: Tensor,
        lengths: Tensor,
        scorer: Scorer,
        before: Seen | None,
        lasting: bool,
        cold: ColdPages | None,
    ) -> Ratings:
        """Scores of the tokens in these pages, and what has been seen: ``before``, and they.

        Scores that are to last need lengths that are all alike; for others nothing is summed up.
        """
        pool = self._tables.pool
        rows = self._window.rows(request_id) if scorer.needs_queries and self._window is not None else None
        natively = self._rate_pages(pages, lengths, scorer, rows, before, cold)
        if natively is not None:
            return natively if lasting else replace(natively, seen=None)
        scores = torch.full((pool.layers, pool.heads, int(lengths.max())), float("-inf"), device=pool.device)
        coded = None
        if cold is not None:
            assert self._cold is not None, "there are no cold pages without a layout for them"
            shape = (pool.layers, pool.heads, cold.pages.shape[2], self._cold.capacity)
            coded = torch.full(shape, float("-inf"), device=pool.device)
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
            # A score that is a mean over heads would depend on how they are split.
            largest = keys.shape[2] if pool.device.type == "cpu" and not scorer.over_heads else 0
            for own in _rated_together(tokens, largest, one_by_one=cold is not None):
                part = None if queries is None else queries[own.start * group : own.stop * group]
                count = tokens[own.start]
                view = (keys[own, :count], values[own, :count], part)
                so_far = None
                if lasting:
                    now = Seen.of(keys[own, :count], values[own, :count])
                    so_far = now if before is None else before[layer][own] + now
                    seen.append(so_far)
                if cold is None or coded is None:
                    scores[layer, own, :count] = self._score(layer, own.start, *view, scorer, so_far)
                    continue
                older, there = self._coded(cold, layer, own.start, keys.dtype)
                joined = (torch.cat([older[0], view[0]], 1), torch.cat([older[1], view[1]], 1), part)
                rated = self._score(layer, own.start, *joined, scorer, so_far)
                scores[layer, own, :count] = rated[:, older[0].shape[1] :]
                coded[layer, own.start][there] = rated[0, : older[0].shape[1]]
        return Ratings(scores, coded, Seen.joined(seen, pool.layers) if lasting else None)

    def _rate_pages(
        self,
        pages: Tensor,
        lengths: Tensor,
        scorer: Scorer,
        rows: Tensor | None,
        before: Seen | None,
        cold: ColdPages | None,
    ) -> Ratings | None:
        """`_rate` without copying hot pages together; None where that cannot be done."""
        pool = self._tables.pool
        if self._redundancy > 0 or not can_rate_pages(scorer, pool.flat):
            return None
        rings = [] if rows is None or self._window is None else self._window.rings
        older, there = (None, None) if cold is None else self._all_coded(cold)
        view = PagedView(pool.flat, self._mover.layout, pages, lengths, rings, rows, self._scales, before, older)
        rated = rate_pages(scorer, view)
        if rated is None:
            return None
        coded = None
        if there is not None and rated.older is not None:
            coded = torch.full(there.shape, float("-inf")).masked_scatter_(there, rated.older)
        return Ratings(rated.scores, coded, rated.seen)

    def _all_coded(self, cold: ColdPages) -> tuple[OlderTokens, Tensor]:
        """All cold tokens, pair after pair, and where they are: ``[L, H, E, C]`` bool."""
        assert self._cold is not None, "there are no cold pages without a layout for them"
        raw = raw_bytes(self._tables.pool.flat, self._cold)
        keys, values, tokens = read_tokens(self._cold, raw, cold.numbers, self._tables.pool.pages.dtype)
        of_page = torch.zeros(cold.pages.shape, dtype=torch.int64)
        of_page[torch.arange(cold.pages.shape[2]) < cold.counts.unsqueeze(2)] = tokens
        there = torch.arange(self._cold.capacity) < of_page.unsqueeze(3)
        return OlderTokens(keys, values, of_page.sum(2).flatten()), there

    def _coded(
        self, cold: ColdPages, layer: int, head: int, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Keys and values ``[1, n, D]`` of a pair's cold tokens, and where they are: ``[E, C]`` bool.

        They stand before the hot ones in a view: they are older than the queries of any window.
        """
        assert self._cold is not None, "checked by the caller"
        count = int(cold.counts[layer, head])
        raw = raw_bytes(self._tables.pool.flat, self._cold)
        keys, values, tokens = decode_delta(self._cold, raw, cold.pages[layer, head, :count], dtype)
        there = torch.zeros(cold.pages.shape[2], self._cold.capacity, dtype=torch.bool, device=keys.device)
        there[:count] = torch.arange(self._cold.capacity, device=keys.device) < tokens.unsqueeze(1)
        own = there[:count]
        return (keys[own].unsqueeze(0), values[own].unsqueeze(0)), there

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


def _rated_together(tokens: Sequence[int], width: int, one_by_one: bool) -> Iterator[slice]:
    """Runs of heads with equally many tokens, on a CPU (``width`` numbers a key, else 0) no more than fit its cache."""
    start = 0
    for end in range(1, len(tokens) + 1):
        large = (end + 1 - start) * tokens[start] * width > _NUMBERS_IN_CACHE
        if end == len(tokens) or tokens[end] != tokens[start] or large or one_by_one:
            yield slice(start, end)
            start = end
