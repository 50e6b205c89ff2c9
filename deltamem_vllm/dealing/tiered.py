# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Deal the pages of one request to pairs and tiers: which tokens stay exact, which are coded, which go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.dealing.cold_pages import ColdChoice, ColdPages, tokens_of_new_pages
from deltamem_vllm.dealing.deal import curve as deal_curve
from deltamem_vllm.dealing.deal import deal_pages, page_utilities
from deltamem_vllm.dealing.tiers import TierPath, tier_path


@dataclass(frozen=True)
class TieredUtility:
    """What further pages are worth to every pair.

    Attributes
    ----------
    order: ``[L, H, N]`` int64, resident indices of the tokens in hot pages, kept first first.
    lengths: ``[L, H]`` int64, how many there are.
    path: how each pair would use n pages for them.
    old: ``[L, H, E]`` float32, what each cold page is worth that there is already, ``-inf`` where there is none; None
        if there are none at all.
    always: ``[L, H]`` float32, what the unprotected tokens in the pages that every pair has in any case are worth.
    """

    order: Tensor
    lengths: Tensor
    path: TierPath
    old: Tensor | None
    always: Tensor

    @property
    def gains(self) -> Tensor:
        """``[L, H or 2 H, P]``: what a page more is worth, as `deal.deal_pages` wants it; old cold pages are pairs of
        their own, best first."""
        if self.old is None:
            return self.path.gains
        width = max(self.path.gains.shape[2], self.old.shape[2])
        both = [self.path.gains, self.old.sort(dim=2, descending=True).values]
        padded = [torch.nn.functional.pad(one, (0, width - one.shape[2]), value=float("-inf")) for one in both]
        return torch.cat(padded, dim=1)

    def curve(self, floor: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """What is retained with more and more blocks, as `deal.curve`; the pairs' first ``floor`` pages are hot."""
        gains = self.gains
        heads, extra = self.lengths.shape[1], gains.shape[1] - self.lengths.shape[1]
        if extra:
            # Old cold pages join the pair they belong to, in order of worth after the floor.
            path, old = gains[:, :heads], gains[:, heads:]
            rest = torch.cat([path[..., floor:].cummin(2).values, old], dim=2).sort(dim=2, descending=True).values
            gains = torch.cat([path[..., :floor], rest], dim=2)
        # Not what the next page adds: that may be a cold one, with several times as many tokens.
        always = (self.always / max(floor, 1)).unsqueeze(2).expand(-1, -1, floor)
        return deal_curve(torch.cat([always, gains[..., floor:]], dim=2), floor)

    def choose(self, budget: int, capacity: int, block_size: int) -> tuple[Tensor, ColdChoice]:
        """Give the pages of ``budget`` blocks to the pairs: hot pages of each, ``[L, H]``, and what is cold."""
        heads = self.lengths.shape[1]
        taken = deal_pages(self.gains, budget * self.lengths.numel())
        pages = taken[:, :heads]
        hot = self.path.hot.gather(2, pages.unsqueeze(2)).squeeze(2)
        made = pages - hot
        new = tokens_of_new_pages(self.order, self.lengths, hot * block_size, made, capacity)
        stay = None
        if self.old is not None:
            rank = self.old.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
            stay = rank < taken[:, heads:].unsqueeze(2)
        return hot, ColdChoice(made, *new, stay)


def tiered_utility(
    scores: Tensor,
    lengths: Tensor,
    cold: ColdPages | None,
    cold_scores: Tensor | None,
    combine: Callable[[Tensor, Tensor], Tensor],
    block_size: int,
    capacity: int,
    loss: float,
    sink: int,
    recent: int,
) -> TieredUtility:
    """Rate what hot and cold pages are worth to each pair.

    All tokens of a pair, wherever they are now, are ranked together, the protected ones first, and ``combine`` says
    what the pages of that ranking are worth; a token's worth is its share of its page's. So a coded token and an exact
    one of equal score count alike, but for ``loss``.

    Parameters
    ----------
    scores: ``[L, H, N]`` float32 of the tokens in hot pages.
    lengths: ``[L, H]`` int64 of them.
    cold: the cold pages that there are; None if none.
    cold_scores: ``[L, H, E, C]`` float, ``-inf`` where there is no token; None exactly if ``cold`` is.
    combine: from the live utility ``[L, H, P]`` of pages and all lengths ``[L, H]`` to what they are worth.
    block_size, capacity: tokens of a hot and at most of a cold page.
    loss: see `tiers.tier_path`.
    sink, recent: protected tokens at either end of the hot ones, which stay exact.
    """
    exact_alone = page_utilities(scores, lengths, block_size, sink, recent)
    order = exact_alone.order
    floor = max(-(-(sink + recent) // block_size), 1)
    every, ends, ranked = scores, lengths, exact_alone
    if cold is not None and cold_scores is not None:
        # Not by their scores: a scorer may rate a token -inf or NaN.
        there = (torch.arange(capacity, device=scores.device) < cold.tokens.unsqueeze(3)).flatten(2)
        ends = lengths + there.sum(2)
        every, exact, coded = _together(scores, lengths, cold_scores.flatten(2).float(), there, sink)
        ranked = page_utilities(every, ends, block_size, sink, recent)
    by_rank = _token_worth(combine(ranked.utility, ends), every.shape[2], block_size, floor)
    worth = torch.empty_like(by_rank).scatter_(2, ranked.order, by_rank)
    hot_worth = worth if every is scores else worth.gather(2, exact)
    exact_first = hot_worth.gather(2, order)
    path = tier_path(exact_first, lengths, block_size, capacity, loss, floor)
    old = None
    if cold is not None and cold_scores is not None:
        mine = worth.gather(2, coded).masked_fill(~there, 0.0)
        old = mine.view(*lengths.shape, -1, capacity).sum(3) * (1.0 - loss)
        absent = torch.arange(old.shape[2], device=old.device) >= cold.counts.unsqueeze(2)
        old = old.masked_fill(absent, float("-inf"))
    return TieredUtility(order, lengths, path, old, exact_first[..., sink + recent : floor * block_size].sum(2))


def _together(
    scores: Tensor, lengths: Tensor, cold_scores: Tensor, there: Tensor, sink: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of hot and cold tokens in one ``[L, H, M]``, and the column of each: ``[L, H, N]`` and ``[L, H, E * C]``.

    Cold tokens stand behind the first ``sink`` hot ones and before all others, which are newer. Columns of tokens that
    do not exist are any.
    """
    coded = there.sum(2, keepdim=True)
    index = torch.arange(scores.shape[2], device=scores.device)
    width = int((lengths.unsqueeze(2) + coded).max())
    exact = torch.where(index < sink, index, index + coded)
    cold = sink + there.cumsum(2) - 1
    every = scores.new_full((*lengths.shape, width + 1), float("-inf"))  # the last column is cut off
    every.scatter_(2, torch.where(index < lengths.unsqueeze(2), exact, width), scores)
    every.scatter_(2, torch.where(there, cold, width), cold_scores)
    return every[..., :width].contiguous(), exact.clamp(max=width - 1), cold.clamp(0, width - 1)


def _token_worth(pages: Tensor, count: int, block_size: int, floor: int) -> Tensor:
    """``[L, H, N]`` worth of each rank from that of whole pages ``[L, H, P]``; the last ones' is that of the last page.

    In the first ``floor`` pages are protected tokens, which may be worth anything: what else is in these counts as the
    page behind them.
    """
    whole = pages > float("-inf")
    each = pages.masked_fill(~whole, 0.0).clamp(min=0.0) / block_size
    last = each.gather(2, (whole.sum(2, keepdim=True) - 1).clamp(min=0))
    each = torch.where(whole, each, last)
    if floor < each.shape[2]:
        each[..., :floor] = each[..., floor : floor + 1]
    tokens = each.repeat_interleave(block_size, dim=2)
    return torch.cat([tokens, last.expand(-1, -1, count - tokens.shape[2])], dim=2)
