# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Mode ``pressure``: nothing is evicted while the pool has room; then memory is taken where it is worth least.

The decision is one number of blocks per request, from numbers the scheduler has anyway. It is made anew in every step
and keeps no state, so a request that ends, is preempted or arrives cannot leave it wrong.

Three rules keep it from working all the time, since a compaction reads and copies a request's whole memory:

- **Two watermarks.** Above the high one, memory is taken down to the low one at once: the pool then has room for many
  steps. The gap also leaves free blocks for the copies themselves.
- **Rest.** A request that was compacted less than ``rest_tokens`` ago is passed over.
- **Worth the copy.** Few requests give much, instead of all of them a little: one that gives at all gives a good part
  of what it holds at once, if it can. Which ones, the price of that part decides. Smaller parts are only taken where
  these do not bring the pool below the high watermark, and very small ones not even then.

They yield when the next step of the running requests would not fit, since vLLM would then preempt one of them and
compute it again: every request gives, also what it deserves by `coverage`, as long as it stays above its floor. No
request starves: floors hold in every case, and what one has given makes its remaining blocks dearer than others'.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deltamem_vllm.memory.curves import UtilityCurve


@dataclass(frozen=True)
class Holding:
    """What one running request holds.

    A block that other requests share counts like its own, although giving it up frees nothing: leave out requests that
    share most of what they hold.

    Attributes
    ----------
    request_id: vLLM's internal request id.
    held: blocks in its block table.
    fixed: of these, blocks that cannot be judged, such as the half-filled last one. They are not given up.
    floor: fewest blocks it may be left with, whatever the pressure.
    deserved: fewest blocks it is left with as long as the next step fits all the same; at least ``floor``. More than
        ``floor`` only with coverage.
    curve: what its other ``held - fixed`` blocks are worth now; None if nobody has looked yet. Each of these blocks is
        then worth the same, and all together one: the request is as dear as any other, and its blocks are the cheaper
        the more it has.
    age: tokens it has seen since its last compaction; None if there was none.
    """

    request_id: str
    held: int
    fixed: int
    floor: int
    deserved: int
    curve: UtilityCurve | None = None
    age: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.fixed <= self.held or not 1 <= self.floor <= self.deserved:
            raise ValueError(f"needs 0 <= fixed <= held and 1 <= floor <= deserved, got {self}")
        if self.curve is not None and self.curve.held < self.held - self.fixed:
            raise ValueError(
                f"the curve of {self.request_id} ends at {self.curve.held} blocks, but {self.held - self.fixed} of "
                f"{self.held} are said to be judged; count blocks beyond it as fixed, or they would cost nothing"
            )

    def price(self, kept: int, fewer: int = 1) -> float:
        """Utility lost when the request goes from ``kept`` blocks to ``fewer`` less, as a share of its total, for each
        of them."""
        if self.curve is None:
            return 1 / (self.held - self.fixed)
        if fewer == 1:
            return self.curve.marginal(kept - self.fixed)
        return (self.curve.at(kept - self.fixed) - self.curve.at(kept - fewer - self.fixed)) / fewer

    def bid(self, kept: int) -> tuple[float, int]:
        """The price of the next block when ``kept`` are left, and how many cost that."""
        if self.curve is None:
            return 1 / (self.held - self.fixed), kept - self.fixed
        return self.curve.slope(kept - self.fixed)


@dataclass(frozen=True)
class Pool:
    """The KV block pool before a step is scheduled.

    Attributes
    ----------
    blocks: that requests can use.
    used: held by live requests; a block with several owners counts once.
    needed: that the running requests ask for in the next step. If they do not fit, vLLM preempts.
    waiting: that the next waiting requests want free before they start.
    """

    blocks: int
    used: int
    needed: int
    waiting: int = 0

    def above(self, share: float) -> int:
        """Blocks used and wanted beyond ``share`` of the pool; negative while there is room."""
        return self.used + self.needed + self.waiting - int(share * self.blocks)

    @property
    def short(self) -> int:
        """Blocks the running requests lack for the next step; negative while there is room."""
        return self.used + self.needed - self.blocks


@dataclass(frozen=True)
class PressureRule:
    """When memory is taken, and what is not worth the work.

    Attributes
    ----------
    high_watermark, low_watermark: shares of the pool, 0 < low < high <= 1: eviction starts above the one and ends at
        the other.
    rest_tokens: age below which a request is passed over (the policy's ``interval``).
    good_gain: share of its blocks, rounded up, that a request should give to be compacted. Each compaction reads again
        what the one before left: the more it frees, the fewer there are.
    least_gain: share of its blocks, rounded down, that a request must give to be compacted at all; at least one.
    """

    high_watermark: float
    low_watermark: float
    rest_tokens: int
    good_gain: float = 1 / 4
    least_gain: float = 1 / 16

    def is_rested(self, holding: Holding) -> bool:
        """Whether the request may be compacted while nothing forces it."""
        return holding.age is None or holding.age >= self.rest_tokens

    def good(self, holding: Holding) -> int:
        """Blocks that should be taken at once from a request that is compacted."""
        return max(math.ceil(self.good_gain * holding.held), 1)

    def least(self, holding: Holding) -> int:
        """Fewest blocks that pay for compacting the request."""
        return max(int(self.least_gain * holding.held), 1)


def relieve(holdings: Sequence[Holding], pool: Pool, rule: PressureRule) -> dict[str, int]:
    """Decide which running requests give blocks back before the next step.

    Count a waiting request in ``pool.waiting`` only if `spare_blocks` make room for it: otherwise the others would be
    cut and it would wait all the same.

    Parameters
    ----------
    holdings: the running requests the policy applies to, in the scheduler's order.
    pool: the pool as it is, and what is wanted of it.
    rule: watermarks and hysteresis.

    Returns
    -------
    request id -> blocks to keep, only for those that are to be compacted; never below a floor, always fewer than held.
    Empty while used and wanted blocks are at or under the high watermark. May free less than wanted.
    """
    if pool.above(rule.high_watermark) <= 0:
        return {}
    wanted = pool.above(rule.low_watermark)
    rested = [h for h in holdings if rule.is_rested(h)]
    taken = take_cheapest(rested, wanted, lambda h: h.deserved, rule.good)
    if sum(taken.values()) < pool.above(rule.high_watermark):
        taken = take_cheapest(rested, wanted, lambda h: h.deserved, rule.least)
    if sum(taken.values()) < pool.short:
        taken = take_cheapest(holdings, wanted, lambda h: h.floor, rule.good)
    if sum(taken.values()) < pool.short:
        taken = take_cheapest(holdings, wanted, lambda h: h.floor, lambda h: 1)
        taken = _without_small(holdings, taken, rule, needed=pool.short)
    return {h.request_id: h.held - taken[h.request_id] for h in holdings if taken.get(h.request_id)}


def spare_blocks(holdings: Iterable[Holding]) -> int:
    """Blocks that these requests can give without going below what they deserve."""
    return sum(max(h.held - max(h.deserved, h.fixed), 0) for h in holdings)


def take_cheapest(
    holdings: Iterable[Holding], count: int, least: Callable[[Holding], int], part: Callable[[Holding], int]
) -> dict[str, int]:
    """Take ``count`` blocks, each where it costs least utility, and from no request less than a part of it.

    The first blocks of a request, its part, are taken together or not at all, at their mean price: what is left to take
    when it is less than a part comes from requests that gave already. Where parts are single blocks and curves concave,
    no other choice of as many blocks costs less in total, and a larger ``count`` takes at least as much from every
    request. Costs O((requests + stretches + ties) log requests), where a stretch is a part of a curve on which blocks
    cost the same.

    Parameters
    ----------
    holdings: who may give.
    count: blocks to take; fewer are taken if there are no more, or only in parts that are too large.
    least: blocks a request must be left with. What is ``fixed`` stays in any case.
    part: blocks that a request gives at least if it gives any; 1 or more.

    Returns
    -------
    request id -> blocks taken, where any are.
    """
    givers = [(h, max(least(h), h.fixed)) for h in holdings]
    # Of equal prices the request with more blocks left gives first, so that equal requests share; then the earlier one,
    # so that the result is the same everywhere. Each bid says how many blocks go at its price.
    bids = []
    for i, (h, bound) in enumerate(givers):
        opening = part(h)
        if h.held - bound >= opening:
            bids.append((h.price(h.held, opening), -h.held, i, opening))
    heapq.heapify(bids)
    taken: dict[str, int] = {}
    while bids and count > 0:
        price, minus_kept, i, number = heapq.heappop(bids)
        holding, bound = givers[i]
        if holding.request_id in taken:
            number = min(number, count) if not bids or bids[0][0] > price else 1
        elif number > count:
            continue
        kept = -minus_kept - number
        taken[holding.request_id] = holding.held - kept
        count -= number
        if kept > bound:
            price, number = holding.bid(kept)
            heapq.heappush(bids, (price, -kept, i, min(number, kept - bound)))
    return taken


def _without_small(
    holdings: Iterable[Holding], taken: Mapping[str, int], rule: PressureRule, needed: int
) -> dict[str, int]:
    """Leave out takes that are not worth a compaction, except the largest of them as far as ``needed`` blocks lack."""
    givers = [h for h in holdings if taken.get(h.request_id)]
    chosen = {h.request_id: taken[h.request_id] for h in givers if taken[h.request_id] >= rule.least(h)}
    freed = sum(chosen.values())
    small = (h.request_id for h in givers if h.request_id not in chosen)
    # Largest first: the fewest compactions. The sort is stable, so equal ones go in the scheduler's order.
    for request_id in sorted(small, key=lambda request_id: -taken[request_id]):
        if freed >= needed:
            break
        chosen[request_id] = taken[request_id]
        freed += taken[request_id]
    return chosen
