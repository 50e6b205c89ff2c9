# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Carries out what was chosen to be cold: codes tokens into new pages and moves old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.dealing.cold_pages import ColdChoice, ColdPages, combined, raw_bytes
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.rater import Ratings
from deltamem_vllm.ops.cold import encode_delta, encode_from, in_words
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.layout import PageLayout

# Pages coded at a time: bounds the scratch memory (with D = 128 in 16 bits and 4-bit codes: about 250 MiB).
_PAGES_AT_A_TIME = 4096


class ColdTier:
    """Writes the cold pages of this rank.

    Parameters
    ----------
    layout: of cold pages.
    loss: share of its worth that a token loses by being coded.
    pool: the pages.
    hot: layout of hot pages.
    """

    def __init__(self, layout: ColdFormat, loss: float, pool: PagePool, hot: PageLayout) -> None:
        self.layout = layout
        self.loss = loss
        self._pool = pool
        self._words = in_words(raw_bytes(pool.flat, layout))
        self._hot = hot
        self._mover = DealtPages(hot)

    def move(
        self,
        choice: ColdChoice,
        old: ColdPages | None,
        pages: Tensor,
        ratings: Ratings,
        target: Tensor,
        in_place: bool,
    ) -> tuple[ColdPages, list[tuple[Tensor, Tensor]]]:
        """Write the cold pages of a compaction.

        Parameters
        ----------
        choice, old: which they are, and those that there were before.
        pages: ``[L, H, W]`` int32 page numbers of the hot tokens that ``choice`` is about.
        ratings: of these tokens.
        target: ``[p + s]`` int64 page numbers for the new pages and then for those that stay.
        in_place: targets may be sources, of hot tokens, too. Nothing is written then.

        Returns
        -------
        The cold pages that there are now, and what is still to be written: page numbers and their bytes, as `in_words`.
        """
        size, made = self._pool.block_size, len(choice.pair)
        pending: list[tuple[Tensor, Tensor]] = []
        by_pair = pages.flatten(0, 1)
        dense = self._dense(min(made, _PAGES_AT_A_TIME)) if in_place else None
        for start in range(0, made, _PAGES_AT_A_TIME):
            part = slice(start, start + _PAGES_AT_A_TIME)
            tokens = choice.tokens[part]
            page, slot = by_pair[choice.pair[part].unsqueeze(1), tokens // size].long(), tokens % size
            counts, places = choice.counts[part], target[:made][part]
            if dense is None:
                encode_from(self._pool.flat, self._hot, self.layout, page, slot, counts, places)
                continue
            out = (dense[0][: page.numel()], dense[1][: page.numel()])
            keys, values = self._mover.gather(self._pool.flat, page.flatten(), slot.flatten(), out)
            shape = (*tokens.shape, self.layout.head_size)
            raw = torch.empty(len(counts), self.layout.page_bytes, dtype=torch.uint8, device=keys.device)
            own = torch.arange(len(counts), device=keys.device)
            encode_delta(self.layout, keys.view(shape), values.view(shape), counts, raw, own)
            pending.append((places, raw.view(self._words.dtype)))
        if old is not None and choice.stay is not None:
            pending.append((target[made:], self._words.index_select(0, old.pages[choice.stay].long())))
            if not in_place:
                self.write(pending)
        scores = None
        if ratings.seen is not None:
            scores = ratings.hot.flatten(0, 1)[choice.pair.unsqueeze(1), choice.tokens]
            absent = torch.arange(self.layout.capacity, device=scores.device) >= choice.counts.unsqueeze(1)
            scores = scores.masked_fill(absent, float("-inf"))
        return combined(choice, old, target, scores), pending

    def _dense(self, pages: int) -> tuple[Tensor, Tensor]:
        """Memory for the tokens of so many cold pages, used for one part of them after the other."""
        shape = (pages * self.layout.capacity, self.layout.head_size)
        keys = torch.empty(shape, dtype=self._pool.flat.dtype, device=self._pool.device)
        return keys, torch.empty_like(keys)

    def wipe(self, pages: Tensor) -> None:
        """Zero pages that are no longer cold, before anything else is written to them.

        Their bytes, read as numbers, may be NaN. Kernels read the last page of a sequence as a whole and multiply what
        nobody has written by weights of zero.
        """
        self._words.index_fill_(0, pages.long(), 0)

    def write(self, pending: list[tuple[Tensor, Tensor]]) -> None:
        """Write what `move` left to be written."""
        for target, words in pending:
            self._words.index_copy_(0, target, words)
        pending.clear()
