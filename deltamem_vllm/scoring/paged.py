# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The package's own scorers, rating tokens where they stand in pages: what their `score` says, without copying all keys
and values together first.

On a CPU with the native library only. A scorer is known by its `score` itself: one that inherits from another and rates
differently is not taken for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from deltamem_vllm.ops import native
from deltamem_vllm.ops.layout import PageLayout
from deltamem_vllm.ops.page_utility import OlderTokens, feature_scores, page_utility, window_attention
from deltamem_vllm.scoring.base import Scorer
from deltamem_vllm.scoring.delta import DeltaScorer
from deltamem_vllm.scoring.distinct import DistinctScorer
from deltamem_vllm.scoring.features import feature_widths
from deltamem_vllm.scoring.keydiff import KeyDiffScorer
from deltamem_vllm.scoring.predictor import PredictorScorer
from deltamem_vllm.scoring.predictor_tova import PredictorTOVAScorer, with_order_of
from deltamem_vllm.scoring.seen import Seen
from deltamem_vllm.scoring.snapkv import SnapKVScorer
from deltamem_vllm.scoring.tova import TOVAScorer


@dataclass(frozen=True)
class PagedView:
    """All layers of one request.

    Attributes
    ----------
    pool: ``[num_pages, block_size * 2 * D]``.
    layout: of its pages.
    pages: ``[L, H, W]`` int32 page numbers in token order.
    lengths: ``[L, H]`` int64 on the host, tokens of each pair in them, 1 or more.
    rings: each layer's queries ``[rows, H_q, D]``; empty for scorers that ask for none.
    rows: ``[w]`` int64, which of them are the request's, oldest first; None without rings.
    scales: each layer's factor on q . k.
    before: what the heads had seen before these tokens; None where that does not count.
    older: tokens that stand before those in pages, pair after pair; None if there are none.
    """

    pool: Tensor
    layout: PageLayout
    pages: Tensor
    lengths: Tensor
    rings: Sequence[Tensor]
    rows: Tensor | None
    scales: Sequence[float]
    before: Seen | None
    older: OlderTokens | None

    def queries(self, last: int | None = None) -> Tensor:
        """The newest ``last`` queries (None: all), ``[L * H, G, w, D]``."""
        if self.rows is None:
            raise ValueError("this view carries no queries: the scorer must set needs_queries = True")
        rows = self.rows if last is None else self.rows[-last:]
        queries = torch.stack([ring.index_select(0, rows) for ring in self.rings])  # [L, w, H_q, D]
        layers, window, _, dim = queries.shape
        grouped = queries.view(layers, window, self.pages.shape[1], -1, dim).permute(0, 2, 3, 1, 4)
        return grouped.flatten(0, 1).contiguous()

    def tables(self) -> tuple[Tensor, Tensor]:
        """Pages and lengths of all pairs: ``[L * H, W]`` and ``[L * H]`` int32."""
        return self.pages.flatten(0, 1), self.lengths.flatten().to(torch.int32)

    def older_of(self, pairs: slice) -> OlderTokens | None:
        """The older tokens of some pairs."""
        if self.older is None:
            return None
        first = int(self.older.counts[: pairs.start].sum())
        own = slice(first, first + int(self.older.counts[pairs].sum()))
        return OlderTokens(self.older.keys[own], self.older.values[own], self.older.counts[pairs])


@dataclass(frozen=True)
class PagedScores:
    """What pages were rated.

    Attributes
    ----------
    scores: ``[L, H, N]`` float32 in token order, ``-inf`` past a pair's last; N is the most tokens of a pair.
    older: ``[m]`` float32 of the older tokens; None if there are none.
    seen: over ``PagedView.before`` and these tokens; None for scorers whose scores do not last.
    """

    scores: Tensor
    older: Tensor | None
    seen: Seen | None = None


def can_rate_pages(scorer: Scorer, pool: Tensor) -> bool:
    """Whether `rate_pages` is worth asking: a scorer of the package, pages on a CPU, and the library is there."""
    return type(scorer).score in _RATES and pool.is_cpu and native.library() is not None


def rate_pages(scorer: Scorer, view: PagedView) -> PagedScores | None:
    """Rate every token of a request.

    Returns
    -------
    None where this scorer cannot do so, or not for these pages: another device, kind of number or layout than the
    native library reads, or no library.
    """
    if not can_rate_pages(scorer, view.pool):
        return None
    if any(ring.dtype != view.pool.dtype for ring in view.rings):
        return None
    return _RATES[type(scorer).score](scorer, view)


def _of_window(view: PagedView, rate: Callable[..., Tensor | None], last: int | None = None) -> PagedScores | None:
    """Scores by window queries: one call for all layers of equal scale."""
    queries, (table, lengths) = view.queries(last), view.tables()
    heads, start, parts = view.pages.shape[1], 0, []
    for scale, run in groupby(view.scales):
        end = start + heads * len(list(run))
        own = slice(start, end)
        pages = (view.pool, view.layout, table[own], lengths[own])
        part = rate(queries[own], *pages, scale, older=view.older_of(own))
        if part is None:
            return None
        parts.append(part)
        start = end
    columns = max(part.shape[1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, columns - part.shape[1])) for part in parts]
    return _within(view, padded[0] if len(padded) == 1 else torch.cat(padded))


def _within(view: PagedView, scores: Tensor, seen: Seen | None = None) -> PagedScores:
    """Scores of all pairs as the library writes them, with ``-inf`` past each pair's tokens and older ones apart."""
    longest, lengths = int(view.lengths.max()), view.lengths.unsqueeze(2)
    by_pair, index = scores.view(*view.lengths.shape, -1), torch.arange(longest)
    if view.older is None:
        cut = by_pair[..., :longest]
        if int(lengths.min()) == longest:
            return PagedScores(cut.contiguous(), None, seen)
        return PagedScores(cut.masked_fill(index >= lengths, float("-inf")), None, seen)
    counts = view.older.counts.view_as(lengths)
    hot = by_pair.gather(2, (counts + index).clamp_(max=by_pair.shape[2] - 1))
    older = by_pair[torch.arange(by_pair.shape[2]) < counts]
    return PagedScores(hot.masked_fill(index >= lengths, float("-inf")), older, seen)


def _delta(scorer: Scorer, view: PagedView) -> PagedScores | None:
    def scores(*arguments: Any, older: OlderTokens | None) -> Tensor | None:
        rated = page_utility(*arguments, older=older)
        return None if rated is None else rated[0]

    return _of_window(view, scores)


def _snapkv(scorer: Scorer, view: PagedView) -> PagedScores | None:
    return _of_window(view, partial(window_attention, pooled=True))


def _tova(scorer: Scorer, view: PagedView) -> PagedScores | None:
    found = _of_window(view, window_attention, last=1)
    if found is not None and view.older is None:  # with older tokens, heads are rated one by one
        for layer, heads in _alike(view.lengths):
            found.scores[layer, heads] = found.scores[layer, heads].mean(-2, keepdim=True)
    return found


def _alike(lengths: Tensor) -> Iterator[tuple[slice | int, slice]]:
    """Runs of a layer's heads with equally many tokens; all layers at once where all heads have."""
    if int(lengths.min()) == int(lengths.max()):
        yield slice(None), slice(0, lengths.shape[1])
        return
    for layer, row in enumerate(lengths.tolist()):
        start = 0
        for _, run in groupby(row):
            end = start + len(list(run))
            yield layer, slice(start, end)
            start = end


def _features(kind: Literal["predictor", "distinct", "keydiff"], view: PagedView, weights: Tensor | None) -> Any:
    before = view.before
    sums = None if before is None else (before.directions.flatten(0, 1), before.values.flatten(0, 1), before.count)
    pages = (view.pool, view.layout, *view.tables())
    return feature_scores(kind, *pages, older=view.older, weights=weights, before=sums)


def _predictor(scorer: Scorer, view: PagedView) -> PagedScores | None:
    assert isinstance(scorer, PredictorScorer), "it has the predictor's score"
    layers, heads, _ = view.pages.shape
    dim = view.layout.head_size
    weights = scorer.weights(slice(0, layers), slice(0, heads), sum(feature_widths(dim, dim)))
    rated = _features("predictor", view, weights.flatten(0, 1).float())
    if rated is None:
        return None
    scores, directions, values = rated
    count = int(view.lengths[0, 0]) + (0 if view.before is None else view.before.count)
    seen = Seen(directions.view(layers, heads, dim), values.view(layers, heads, dim), count)
    return _within(view, scores, seen)


def _predictor_tova(scorer: Scorer, view: PagedView) -> PagedScores | None:
    if view.older is not None:
        return None  # both orders are over older tokens, too, which the library hands back apart
    expected, looked_at = _predictor(scorer, view), _tova(scorer, view)
    if expected is None or looked_at is None:
        return None
    return PagedScores(with_order_of(expected.scores, looked_at.scores), None, expected.seen)


def _plain(kind: Literal["distinct", "keydiff"]) -> Callable[[Scorer, PagedView], PagedScores | None]:
    def rate(scorer: Scorer, view: PagedView) -> PagedScores | None:
        rated = _features(kind, view, None)
        return None if rated is None else _within(view, rated[0])

    return rate


_RATES: dict[Callable[..., Tensor], Callable[[Scorer, PagedView], PagedScores | None]] = {
    DeltaScorer.score: _delta,
    SnapKVScorer.score: _snapkv,
    TOVAScorer.score: _tova,
    PredictorScorer.score: _predictor,
    PredictorTOVAScorer.score: _predictor_tova,
    DistinctScorer.score: _plain("distinct"),
    KeyDiffScorer.score: _plain("keydiff"),
}
