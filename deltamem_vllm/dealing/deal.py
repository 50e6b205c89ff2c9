# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Deal whole pages of one request to the pairs (layer, kv head) whose best tokens are worth most.

Inside a pair, tokens are ranked and cut into pages: the best ``block_size`` tokens are page 0, the next ones page 1,
and so on. A page's utility is the sum of its tokens' scores. A request that keeps m blocks owns ``m * L * H`` pages;
they go to the best pages of all pairs, and a pair that gets n pages keeps its ``n * block_size`` best tokens.

Everything but :func:`curve` runs without waiting for the device: no data-dependent shapes. What depends on the values
of a tensor is therefore checked on CPU only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.dealing.order import FIRST_RANK, INDEX_BITS, INDEX_MASK, LAST_RANK, newest_first, ordered_bits
from deltamem_vllm.ops import deal_pages as native

# Infinite scores count as this much, so that no sum over a request (2 ** 27 entries and more) overflows float32.
_LARGEST_SCORE = 1e30
_CURVE_POINTS = 64


@dataclass(frozen=True)
class RankedPages:
    """The tokens of every pair in the order in which they would be given up last.

    Attributes
    ----------
    order: ``[L, H, N]`` int64, resident indices of each pair, best first; indices past a pair's length come last.
    utility: ``[L, H, P]`` float32, ``P = N // block_size``: the summed scores of each whole page, -inf where a pair's
        tokens do not fill the page. Never increases after the pages that hold protected tokens.
    """

    order: Tensor
    utility: Tensor


def page_utilities(scores: Tensor, lengths: Tensor, block_size: int, sink: int, recent: int) -> RankedPages:
    """Rank every pair's tokens and rate the pages they would fill.

    Protected tokens (the first ``sink`` and the last ``recent`` of a pair) come first whatever their scores; then
    higher scores, of equal ones the newer token, NaN last: the order of ``scoring.base.select_survivors``. Utilities
    are sums of the true scores, protected or not, with NaN as 0 and infinity as 1e30. They mean something across pairs
    only for comparable scores; the ranks inside a pair are right for any.

    Parameters
    ----------
    scores: ``[L, H, N]`` float, higher = keep; what stands past a pair's length is ignored.
    lengths: ``[L, H]`` int64, resident tokens of each pair, at most N.
    block_size: tokens of a page, at most N.
    sink, recent: protected tokens at either end of each pair.

    Raises
    ------
    ValueError: a shape, dtype or number is none of the above. Lengths are checked on CPU only.
    """
    _check_ranking(scores, lengths, block_size, sink, recent)
    ranked_natively = native.rank_pages(scores, lengths, block_size, sink, recent)
    if ranked_natively is not None:
        return RankedPages(*ranked_natively)
    index = torch.arange(scores.shape[2], device=scores.device)
    ends = lengths.unsqueeze(2)
    protected = (index < sink) | (index >= ends - recent)
    scores = scores.float()
    rank = ordered_bits(scores).masked_fill_(protected, FIRST_RANK).masked_fill_(index >= ends, LAST_RANK)
    order = newest_first(rank)

    pages = scores.shape[2] // block_size
    summable = scores.nan_to_num(nan=0.0).clamp_(-_LARGEST_SCORE, _LARGEST_SCORE)
    ranked = summable.gather(2, order[:, :, : pages * block_size])
    utility = ranked.view(*ranked.shape[:2], pages, block_size).sum(3)
    # Pages of descending tokens descend by themselves, but for the rounding of the sums.
    free = -(-(sink + recent) // block_size)
    if free < pages:
        utility[:, :, free:] = utility[:, :, free:].cummin(2).values
    utility.masked_fill_(torch.arange(1, pages + 1, device=scores.device) * block_size > ends, float("-inf"))
    return RankedPages(order, utility)


def deal(utility: Tensor, block_size: int, budget: int, floor: int) -> Tensor:
    """Give the pages of ``budget`` blocks to the pairs.

    Every pair gets its first ``floor`` pages; the rest goes to the best pages of all pairs. A page is dealt only after
    all earlier pages of its pair, so one that is worth more than an earlier page counts as much as that one. Of equal
    pages the earlier in its pair is dealt first, then the lower layer, then the lower head.

    Parameters
    ----------
    utility: ``[L, H, P]`` float, -inf for pages that cannot be dealt, which come last in a pair.
    block_size: tokens of a page.
    budget: blocks, ``floor <= budget <= P``. The pairs must have ``budget * L * H`` pages that can be dealt, and each
        of them ``floor``.
    floor: pages that every pair gets, 0 or more.

    Returns
    -------
    ``[L, H]`` int64: pages of each pair; they sum to ``budget * L * H``.

    Raises
    ------
    ValueError: a shape or number is none of the above. Pages that cannot be dealt are counted on CPU only.
    """
    _check_utility(utility)
    layers, heads, count = utility.shape
    if not 0 <= floor <= budget <= count or block_size < 1:
        raise ValueError(
            f"cannot deal {budget} blocks of {block_size} tokens with at least {floor} pages for every pair out of "
            f"{count} pages a pair; 0 <= floor <= budget <= {count} and block_size >= 1 are needed"
        )
    if utility.device.type == "cpu":
        _check_supply(utility, budget, floor)
    worth = utility.float()
    # Pages that are dealt anyway (they may hold protected tokens of no worth) must not hold back the later ones.
    whole = worth[:, :, :floor] != float("-inf")
    # Elsewhere infinity is a number like others: it does not go before an earlier page of its pair.
    free = worth[:, :, floor:].clamp(max=torch.finfo(torch.float32).max)
    worth = torch.cat([worth[:, :, :floor].masked_fill(whole, float("inf")), free], dim=2)
    return deal_pages(worth, budget * layers * heads)


def deal_pages(worth: Tensor, wanted: int) -> Tensor:
    """Give ``wanted`` pages to the pairs that they are worth most to; see :func:`deal`.

    Parameters
    ----------
    worth: ``[L, H, P]`` float, of each pair's next page and the ones after it; ``+inf`` where it must be dealt, -inf
        where it cannot be.
    wanted: pages, at most as many as can be dealt.

    Returns
    -------
    ``[L, H]`` int64: pages of each pair.
    """
    dealt = native.deal_pages(worth, wanted)
    if dealt is not None:
        return dealt
    layers, heads, count = worth.shape
    worth = worth.float()
    whole = worth != float("-inf")
    # NaN would swallow all later pages of its pair in cummin.
    clean = torch.where(whole, worth.nan_to_num(nan=0.0, posinf=float("inf")), float("-inf"))
    rank = ordered_bits(clean.cummin(2).values)
    rank.masked_fill_(worth == float("inf"), FIRST_RANK)
    # (rank, place) is different for every page, so exactly the wanted number reaches the threshold.
    place = torch.arange(count * layers * heads, device=worth.device).view(count, layers, heads).permute(1, 2, 0)
    key = (rank << INDEX_BITS) + (INDEX_MASK - place)
    if wanted == 0:
        return torch.zeros(layers, heads, dtype=torch.int64, device=worth.device)
    threshold = key.flatten().topk(wanted, sorted=False).values.amin()
    return (key >= threshold).sum(2)


def survivors(order: Tensor, pages: Tensor, block_size: int) -> Tensor:
    """Mark the tokens that every pair keeps.

    Parameters
    ----------
    order: ``[L, H, N]`` int64 as of :class:`RankedPages`.
    pages: ``[L, H]`` int64, pages of each pair, ``pages * block_size <= N``.
    block_size: tokens of a page.

    Returns
    -------
    ``[L, H, N]`` bool by resident index: the first ``pages * block_size`` tokens in ``order``.

    Raises
    ------
    ValueError: a shape, dtype or number is none of the above. Page counts are checked on CPU only.
    """
    if order.dim() != 3 or order.dtype != torch.int64 or pages.shape != order.shape[:2] or pages.dtype != torch.int64:
        raise ValueError(
            "order must be [L, H, N] and pages [L, H], both int64, "
            f"got {tuple(order.shape)} {order.dtype} and {tuple(pages.shape)} {pages.dtype}"
        )
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    n = order.shape[2]
    if pages.device.type == "cpu" and bool(((pages < 0) | (pages * block_size > n)).any()):
        raise ValueError(
            f"a pair of {n} tokens can keep 0 to {n // block_size} pages of {block_size}, "
            f"got {int(pages.min())} to {int(pages.max())}"
        )
    natively = native.survivors(order, pages, block_size)
    if natively is not None:
        return natively
    kept = torch.arange(n, device=order.device) < (pages * block_size).unsqueeze(2)
    return torch.empty_like(order, dtype=torch.bool).scatter_(2, order, kept)


def page_mass(scores: Tensor, lengths: Tensor, order: Tensor, block_size: int, sink: int, recent: int) -> Tensor:
    """What each page holds of the scores of its pair: how much of this request's content is where.

    Unlike utility it compares nothing across pairs, so it means something for every scorer. Protected tokens are left
    out: they stay in any case, and sinks hold most of what attention scores see.

    Parameters
    ----------
    scores: ``[L, H, N]`` float. Where a pair has negative ones, they are counted from its lowest.
    lengths: ``[L, H]`` int64, resident tokens of each pair.
    order: ``[L, H, N]`` int64 as of :class:`RankedPages`.
    block_size, sink, recent: as in :func:`page_utilities`.

    Returns
    -------
    ``[L, H, P]`` float32: the share of the pair's mass in each page of ``order``; 0 for pages that do not exist. What
    is left of a pair after its last whole page is missing from its sum.
    """
    natively = native.page_mass(scores, lengths, order, block_size, sink, recent)
    if natively is not None:
        return natively
    index = torch.arange(scores.shape[2], device=scores.device)
    ends = lengths.unsqueeze(2)
    free = (index >= sink) & (index < ends - recent)
    worth = scores.float().nan_to_num(nan=0.0).clamp_(-_LARGEST_SCORE, _LARGEST_SCORE)
    lowest = worth.masked_fill(~free, float("inf")).amin(2, keepdim=True).clamp_(max=0.0)
    worth = (worth - lowest).masked_fill_(~free, 0.0).double()
    total = worth.sum(2, keepdim=True)
    # Where all is worth nothing, one token is as good as another.
    even = free.double() / free.sum(2, keepdim=True).clamp(min=1)
    worth = torch.where(total > 0, worth / total, even)
    pages = scores.shape[2] // block_size
    ranked: Tensor = worth.gather(2, order[:, :, : pages * block_size])
    return ranked.view(*ranked.shape[:2], pages, block_size).sum(3).float()


def curve(utility: Tensor, floor: int, mass: Tensor | None = None) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The share of a request that is retained when it keeps more and more blocks.

    Waits for the device: the result is numbers on the host.

    Parameters
    ----------
    utility: ``[L, H, P]`` float; -inf for pages that do not exist. Says in which order pages are dealt.
    floor: pages that every pair gets before the others are dealt; also the first point.
    mass: ``[L, H, P]`` float >= 0: what is lost with each page. The utility itself where None; negative utilities then
        count as 0.

    Returns
    -------
    blocks: at most 64 ascending block counts from ``floor`` to all there are, closer together where few are kept.
    mass: the share of all mass that :func:`deal` retains with that many blocks; never decreases, the last is 1.0.
        If no page has any, the share of the blocks.

    Raises
    ------
    ValueError: not a utility, a mass of another shape, or not every pair has ``floor`` whole pages.
    """
    _check_utility(utility)
    layers, heads, count = utility.shape
    if not 0 <= floor <= count:
        raise ValueError(f"floor must lie between 0 and the {count} pages of a pair, got {floor}")
    if mass is not None and mass.shape != utility.shape:
        raise ValueError(f"mass must be {tuple(utility.shape)} like the utility, got {tuple(mass.shape)}")
    _check_supply(utility, floor, floor)
    pairs = layers * heads
    exists = utility != float("-inf")
    last = -(-int(exists.sum()) // pairs)
    worth = utility.double().nan_to_num(nan=0.0, posinf=_LARGEST_SCORE, neginf=-_LARGEST_SCORE)
    # A page is dealt after all earlier ones of its pair, and those below the floor before all others.
    worth = torch.cat([worth[:, :, :floor], worth[:, :, floor:].cummin(2).values], dim=2)
    lost = worth.clamp(min=0.0) if mass is None else mass.double().clamp(min=0.0)
    lost = lost.masked_fill(~exists, 0.0)
    always = lost[:, :, :floor].sum()
    dealt = worth[:, :, floor:].masked_fill(~exists[:, :, floor:], float("-inf")).flatten()
    best_first = dealt.sort(descending=True, stable=True).indices[: (last - floor) * pairs]
    rest = lost[:, :, floor:].flatten()[best_first]
    retained: list[float] = torch.cat([always.view(1), rest.view(last - floor, pairs).sum(1)]).cumsum(0).tolist()
    blocks = _sampled(floor, last)
    if retained[-1] <= 0.0:
        retained = [float(m) for m in range(floor, last)] + [max(1.0, last)]
    return tuple(blocks), (*(min(1.0, retained[m - floor] / retained[-1]) for m in blocks[:-1]), 1.0)


def _sampled(first: int, last: int) -> list[int]:
    """At most 64 integers from ``first`` to ``last``, spaced quadratically: curves bend where little is kept."""
    steps = _CURVE_POINTS - 1
    if last - first <= steps:
        return list(range(first, last + 1))
    return sorted({first + round((last - first) * (i / steps) ** 2) for i in range(_CURVE_POINTS)})


def _check_ranking(scores: Tensor, lengths: Tensor, block_size: int, sink: int, recent: int) -> None:
    if scores.dim() != 3 or not scores.is_floating_point() or 0 in scores.shape:
        raise ValueError(
            f"scores must be a float [L, H, N] without an empty dimension, got {tuple(scores.shape)} {scores.dtype}"
        )
    if lengths.shape != scores.shape[:2] or lengths.dtype != torch.int64:
        raise ValueError(f"lengths must be int64 {tuple(scores.shape[:2])}, got {lengths.dtype} {tuple(lengths.shape)}")
    n = scores.shape[2]
    if not 1 <= block_size <= n:
        raise ValueError(f"block_size must be 1 to {n} (the resident tokens), got {block_size}")
    if sink < 0 or recent < 0:
        raise ValueError(f"sink and recent must be >= 0, got {sink=}, {recent=}")
    if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > n)).any()):
        raise ValueError(f"lengths must lie between 0 and {n}, got {int(lengths.min())} to {int(lengths.max())}")


def _check_utility(utility: Tensor) -> None:
    if utility.dim() != 3 or not utility.is_floating_point() or 0 in utility.shape:
        raise ValueError(
            f"utility must be a float [L, H, P] without an empty dimension, got {tuple(utility.shape)} {utility.dtype}"
        )


def _check_supply(utility: Tensor, budget: int, floor: int) -> None:
    """Whether the pairs have the pages; reads values, so it waits for the device."""
    whole = (utility != float("-inf")).sum(2)
    pairs = whole.numel()
    if int(whole.min()) < floor:
        raise ValueError(
            f"every pair must get {floor} pages but one has only {int(whole.min())}; lower the floor or the number of "
            "protected tokens"
        )
    if int(whole.sum()) < budget * pairs:
        raise ValueError(
            f"cannot deal {budget} blocks = {budget * pairs} pages: the {pairs} pairs have {int(whole.sum())} whole "
            f"pages; deal at most {int(whole.sum()) // pairs} blocks"
        )
