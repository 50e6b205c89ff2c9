# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Slow, obvious definitions of dealing: one token and one page at a time. Tests compare ``deal.py`` with these."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ranked(scores: list[float], sink: int, recent: int) -> list[int]:
    """One pair's tokens, best first."""
    n = len(scores)

    def place(j: int) -> tuple[bool, float, int]:
        protected = j < sink or j >= n - recent
        score = -math.inf if math.isnan(scores[j]) else scores[j]
        return (not protected, 0.0 if protected else -score, -j)

    return sorted(range(n), key=place)


def page_utilities(scores: list[float], order: list[int], block_size: int, sink: int, recent: int) -> list[float]:
    """Summed scores of the whole pages that one pair's tokens fill in that order.

    After the pages of protected tokens none counts as more than an earlier one. Scores that cannot be summed stand for
    numbers: NaN for 0, infinity for 1e30.
    """
    finite = [0.0 if math.isnan(s) else min(max(s, -1e30), 1e30) for s in scores]
    utility: list[float] = []
    for k in range(len(order) // block_size):
        worth = sum(finite[j] for j in order[k * block_size : (k + 1) * block_size])
        if utility and (k - 1) * block_size >= sink + recent:
            worth = min(worth, utility[-1])
        utility.append(worth)
    return utility


def deal(utility: Tensor, budget: int, floor: int) -> Tensor:
    """Take the best next page of any pair until all are dealt: ``[L, H]`` int64. Pages must not increase after floor.

    ``utility`` is ``[L, H, P]``, -inf for pages that cannot be dealt.
    """
    layers, heads, count = utility.shape
    pages = torch.full((layers, heads), floor)
    for _ in range((budget - floor) * layers * heads):
        offers = [
            (-float(utility[layer, head, k]), k, layer, head)
            for layer in range(layers)
            for head in range(heads)
            if (k := int(pages[layer, head])) < count
        ]
        _, _, layer, head = min(offers)
        pages[layer, head] += 1
    return pages


def retained(utility: Tensor, pages: Tensor) -> float:
    """Summed utility of the first ``pages[l, h]`` pages of every pair."""
    layers, heads, _ = utility.shape
    return sum(
        float(utility[layer, head, k])
        for layer in range(layers)
        for head in range(heads)
        for k in range(int(pages[layer, head]))
    )


def deal_pages(worth: Tensor, wanted: int) -> Tensor:
    """As `deal`, of pages that may be worth more than one before them: such a page counts no more than that one.

    ``worth`` is ``[L, H, P]``; +inf for pages that are dealt before all others, -inf for those that cannot be.
    """
    layers, heads, _ = worth.shape
    pages = torch.zeros(layers, heads, dtype=torch.int64)
    for _ in range(wanted):
        offers = []
        for layer in range(layers):
            for head in range(heads):
                own = [float(w) for w in worth[layer, head]]
                k = int(pages[layer, head])
                if k < len(own) and own[k] > -math.inf:
                    offers.append((-min(own[: k + 1]), k, layer, head))
        _, _, layer, head = min(offers)
        pages[layer, head] += 1
    return pages


def splits(worth: list[float], pages: int, block_size: int, capacity: int, loss: float, floor: int) -> dict[int, float]:
    """What one pair's pages hold, by how many of them are hot, for every way to split them.

    ``worth`` is that of its tokens, best first. A hot page is full; a cold one has at least one token.
    """
    found = {}
    for hot in range(floor, pages + 1):
        exact, cold = hot * block_size, pages - hot
        if exact > len(worth) or (cold and exact + (cold - 1) * capacity >= len(worth)):
            continue
        coded = worth[exact : exact + cold * capacity]
        found[hot] = sum(worth[:exact]) + (1 - loss) * sum(coded)
    return found


def token_worth(order: list[int], pages: list[float], block_size: int, floor: int) -> list[float]:
    """What one pair's tokens are worth, in their own order: an equal share of the page they are ranked into.

    ``order`` is that ranking and ``pages`` the worth of its whole pages; tokens after the last of them count as those
    in it, and those of the first ``floor`` pages as those of the next.
    """
    worth = [0.0] * len(order)
    for place, token in enumerate(order):
        page = min(max(place // block_size, floor), len(pages) - 1)
        worth[token] = max(pages[page], 0.0) / block_size
    return worth
