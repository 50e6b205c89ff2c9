# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The cold pages of a request: which there are, how they are made, and how they move.

A cold page is written once. Later compactions keep it or give it up as a whole, as bytes: tokens that were coded again
and again would lose a little each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat


@dataclass(frozen=True)
class ColdPages:
    """Cold pages by pair; entries past a pair's count are 0, their scores ``-inf``.

    Attributes
    ----------
    counts: ``[L, H]`` int64, pages of each pair.
    pages: ``[L, H, E]`` int32 page numbers.
    tokens: ``[L, H, E]`` int64, tokens of each page.
    scores: ``[L, H, E, C]`` float16, what each of these tokens was rated; None by a scorer whose scores do not last.
        Half precision: 2 bytes beside the ``D * bits / 4`` of a token, 3% with heads of 128 and 4 bits.
    """

    counts: Tensor
    pages: Tensor
    tokens: Tensor
    scores: Tensor | None

    @property
    def numbers(self) -> Tensor:
        """Page numbers of all pairs, ``[total]``; waits for the device."""
        there = torch.arange(self.pages.shape[2], device=self.pages.device) < self.counts.unsqueeze(2)
        return self.pages[there]

    @property
    def total(self) -> int:
        """Cold pages of all pairs; waits for the device."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class ColdChoice:
    """What of a request becomes or stays cold in one compaction.

    Attributes
    ----------
    made: ``[L, H]`` int64, new cold pages of each pair.
    pair, tokens: ``[p]`` and ``[p, C]`` int64 of the new pages, those of the first pair first: pair ``l * H + h`` and
        resident indices of the tokens.
    counts: ``[p]`` int64, tokens of each new page; what stands past them in ``tokens`` is 0.
    stay: ``[L, H, E]`` bool, which of the old cold pages stay.
    """

    made: Tensor
    pair: Tensor
    tokens: Tensor
    counts: Tensor
    stay: Tensor | None


def tokens_of_new_pages(
    order: Tensor, lengths: Tensor, first: Tensor, made: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens go to which new cold page: the best of them to a pair's first, so that its last is given up first.

    Parameters
    ----------
    order: ``[L, H, N]`` int64, resident indices of each pair, kept first first.
    lengths: ``[L, H]`` int64, tokens of each pair.
    first: ``[L, H]`` int64, rank of the first token that is cold.
    made: ``[L, H]`` int64, new pages of each pair.
    capacity: C.

    Returns
    -------
    ``pair``, ``tokens`` and ``counts`` of `ColdChoice`.
    """
    flat = made.flatten()
    pair = torch.arange(len(flat), device=flat.device).repeat_interleave(flat)
    page = torch.arange(len(pair), device=flat.device) - (flat.cumsum(0) - flat)[pair]
    rank = (first.flatten()[pair] + page * capacity).unsqueeze(1) + torch.arange(capacity, device=flat.device)
    there = rank < lengths.flatten()[pair].unsqueeze(1)
    tokens = order.flatten(0, 1)[pair.unsqueeze(1), rank.clamp(max=order.shape[2] - 1)]
    return pair, tokens.masked_fill(~there, 0), there.sum(1)


def by_pair(counts: Tensor, flat: Tensor, fill: float = 0) -> Tensor:
    """Rows ``[sum(counts), ...]``, pair after pair, as ``[L, H, E, ...]``, filled up."""
    widest = int(counts.max())
    column = torch.arange(widest, device=flat.device)
    ends = counts.flatten().cumsum(0).view_as(counts)
    index = ((ends - counts).unsqueeze(-1) + column).clamp_(max=max(len(flat) - 1, 0))
    absent = column >= counts.unsqueeze(-1)
    if not len(flat):
        return flat.new_full((*counts.shape, widest, *flat.shape[1:]), fill)
    rows = flat[index]
    return rows.masked_fill(absent.view(*absent.shape, *(1,) * (rows.dim() - 3)), fill)


def combined(choice: ColdChoice, old: ColdPages | None, pages: Tensor, scores: Tensor | None) -> ColdPages:
    """The cold pages after a compaction: each pair's new ones, then those that stay.

    Parameters
    ----------
    pages: ``[p + s]`` int32 or int64, page numbers of all new pages, then of all that stay, each pair after pair.
    scores: ``[p, C]`` of the new pages' tokens, ``-inf`` past a page's last; None where scores do not last.
    """
    new = choice.made
    pages = pages.to(torch.int32)
    made = len(choice.pair)
    if old is None or choice.stay is None:
        kept_scores = None if scores is None else by_pair(new, _halved(scores), float("-inf"))
        return ColdPages(new, by_pair(new, pages[:made]), by_pair(new, choice.counts), kept_scores)
    stay = choice.stay
    staying = stay.sum(2)
    # Sorting by pair, with each pair's new pages before its old ones, interleaves the two lists.
    heads = torch.arange(new.numel(), device=new.device)
    owner = torch.cat([choice.pair, heads.repeat_interleave(staying.flatten())])
    order = owner.argsort(stable=True)
    tokens = torch.cat([choice.counts, old.tokens[stay]])[order]
    counts = new + staying
    joined = None
    if scores is not None and old.scores is not None:
        joined = by_pair(counts, torch.cat([_halved(scores), old.scores[stay]])[order], float("-inf"))
    return ColdPages(counts, by_pair(counts, pages[order]), by_pair(counts, tokens), joined)


def _halved(scores: Tensor) -> Tensor:
    """float16 scores, those that it cannot hold as its largest: infinity would outrank all others."""
    largest = torch.finfo(torch.float16).max
    return torch.where(scores.isinf(), scores, scores.clamp(-largest, largest)).half()


class ColdTables:
    """Cold pages of the batch that is running, in persistent memory.

    Parameters
    ----------
    shape: ``(L, rows, H)``.
    max_width: cold pages of a pair that there is room for if ``fixed``.
    fixed: allocate all of it at once, so that addresses never change. Otherwise tables grow as needed.
    """

    def __init__(self, shape: tuple[int, int, int], max_width: int, fixed: bool, device: torch.device) -> None:
        self._max_width = max_width if fixed else None
        self._pages = torch.zeros(*shape, max_width if fixed else min(4, max_width), dtype=torch.int32, device=device)
        self._counts = torch.zeros(shape, dtype=torch.int32, device=device)

    def put(self, row: int, cold: ColdPages | None) -> None:
        """Write one row of the batch."""
        if cold is None or not cold.pages.shape[2]:
            self._counts[:, row] = 0
            return
        width = cold.pages.shape[2]
        if self._max_width is not None and width > self._max_width:
            raise RuntimeError(
                f"a (layer, kv head) would read {width} cold pages, but there is room for {self._max_width}: as "
                "many as hold every token of a request of maximal length uncoded"
            )
        if width > self._pages.shape[3]:
            grown = self._pages.new_zeros(*self._pages.shape[:3], max(width, 2 * self._pages.shape[3]))
            grown[..., : self._pages.shape[3]] = self._pages
            self._pages = grown
        self._pages[:, row, :, :width] = cold.pages
        self._counts[:, row] = cold.counts

    def clear(self, start: int, end: int) -> None:
        """These rows have no cold pages."""
        self._counts[:, start:end] = 0

    def of(self, rows: int) -> tuple[Tensor, Tensor]:
        """``[L, rows, H, E]`` int32 page numbers and ``[L, rows, H]`` int32 how many of them are used."""
        return self._pages[:, :rows], self._counts[:, :rows]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tables."""
        return self._pages.nbytes + self._counts.nbytes


def raw_bytes(pool: Tensor, layout: ColdFormat) -> Tensor:
    """The pool ``[NP, block_size * 2 * D]`` as bytes ``[NP, page_bytes]``, the same memory."""
    raw = pool.view(torch.uint8)
    if raw.shape[1] != layout.page_bytes:
        raise ValueError(f"a page of the pool has {raw.shape[1]} bytes, a cold page {layout.page_bytes}")
    return raw
