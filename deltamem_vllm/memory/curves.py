# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a request's memory is worth: the share of its utility that a number of blocks retains.

A worker draws the curve (`dealing.deal.curve`); the scheduler reads off it how much a request deserves (coverage) and
whose next block costs least (pressure). Utilities of different requests have no common unit, so every curve is a share
of the request's own total: a request counts as one, however long it is.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

MOST_POINTS = 64
"""Points of a curve: enough for its bend, few enough to send with every report."""


@dataclass(frozen=True)
class UtilityCurve:
    """Share of a request's utility that its best pages retain, by blocks kept.

    Between two points the curve is a straight line, and so it is from zero blocks, which retain nothing, to the first
    point. That first stretch is a guess: no request keeps less than its floor, where curves of workers start.

    Curves of dealt pages are concave from the floor on, since the best pages are kept first. Nothing here relies on
    it, but only then is the next block given up the cheapest one.

    Attributes
    ----------
    blocks: ascending, the first at least 1, at most `MOST_POINTS`. The last is what the request held, in whole blocks.
    mass: share retained by as many blocks, in [0, 1], non-decreasing. The last is 1 for a request that has lost
        nothing.
    """

    blocks: tuple[int, ...]
    mass: tuple[float, ...]

    def __post_init__(self) -> None:
        blocks, mass = self.blocks, self.mass
        if not 1 <= len(blocks) <= MOST_POINTS or len(mass) != len(blocks):
            raise ValueError(
                f"a curve has 1 to {MOST_POINTS} points, each with a mass; "
                f"got {len(blocks)} blocks and {len(mass)} masses"
            )
        if blocks[0] < 1 or any(a >= b for a, b in zip(blocks, blocks[1:], strict=False)):
            raise ValueError(f"the blocks of a curve must be ascending from at least 1, got {blocks}")
        # Written so that NaN fails, too.
        if not (mass[0] >= 0 and mass[-1] <= 1 and all(a <= b for a, b in zip(mass, mass[1:], strict=False))):
            raise ValueError(f"the masses of a curve must not decrease and lie in [0, 1], got {mass}")

    @property
    def held(self) -> int:
        """Whole blocks the request held when the curve was drawn or cut."""
        return self.blocks[-1]

    @property
    def retained(self) -> float:
        """Share of the utility that is still there."""
        return self.mass[-1]

    def at(self, blocks: int) -> float:
        """Share retained by that many blocks; more than `held` retain no more."""
        if blocks <= 0:
            return 0.0
        if blocks >= self.held:
            return self.retained
        i = bisect_left(self.blocks, blocks)
        right, upper = self.blocks[i], self.mass[i]
        if right == blocks:
            return upper
        left, lower = (self.blocks[i - 1], self.mass[i - 1]) if i else (0, 0.0)
        # Rounding must not lift a point above the next one: `fewest` searches on a curve that never falls.
        return min(upper, lower + (upper - lower) * ((blocks - left) / (right - left)))

    def marginal(self, blocks: int) -> float:
        """Utility lost by going from ``blocks`` to ``blocks - 1``, as a share of the total; >= 0."""
        return self.at(blocks) - self.at(blocks - 1)

    def slope(self, blocks: int) -> tuple[float, int]:
        """Price of a block and how many cost that: the straight stretch that ends at ``blocks``.

        Returns
        -------
        Utility lost with each of the next blocks given up, as a share of the total, and their number, at least 1 as
        long as there is a block.
        """
        if blocks > self.held:
            return 0.0, blocks - self.held
        i = bisect_left(self.blocks, blocks)
        left, lower = (self.blocks[i - 1], self.mass[i - 1]) if i else (0, 0.0)
        return (self.mass[i] - lower) / (self.blocks[i] - left), blocks - left

    def fewest(self, coverage: float) -> int:
        """Fewest blocks that retain at least ``coverage``; `held` if even all of them do not."""
        low, high = 0, self.held
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(middle) >= coverage else (middle + 1, high)
        return low

    def cut(self, blocks: int) -> UtilityCurve:
        """The curve of the request after a compaction to that many blocks.

        The total stays what it was, so what was lost counts: a request that gave much has dear blocks left.

        Raises
        ------
        ValueError
            Fewer than one block.
        """
        if blocks < 1:
            raise ValueError(f"a compacted request keeps at least 1 block, got {blocks}")
        if blocks >= self.held:
            return self
        i = bisect_left(self.blocks, blocks)
        return UtilityCurve((*self.blocks[:i], blocks), (*self.mass[:i], self.at(blocks)))

    def scaled(self, share: float) -> UtilityCurve:
        """The same curve for a request that holds only ``share`` of its utility (see `still_held`).

        A worker draws each curve of what is resident, as if nothing had been lost before.

        Raises
        ------
        ValueError
            A share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        return UtilityCurve(self.blocks, tuple(share * mass for mass in self.mass))

    def grown(self, blocks: int, share: float) -> UtilityCurve:
        """The curve of the request after it has written that many whole blocks, before anyone looks at them.

        They are taken to be worth the same, each, and are given up in the order of price like all others: a block that
        costs less is lost before them.

        Parameters
        ----------
        blocks: written since.
        share: of the request's utility that they hold, in [0, 1]; what there was weighs as much less.

        Raises
        ------
        ValueError
            A share outside [0, 1].
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        if blocks <= 0:
            return self
        before = self.scaled(1 - share)
        points = list(zip(before.blocks, before.mass, strict=True))
        at = 1
        while at < len(points) and before.slope(points[at][0])[0] >= share / blocks:
            at += 1
        end, mass = points[at - 1]
        later = [(end + blocks, mass + share), *((b + blocks, m + share) for b, m in points[at:])]
        points = [*points[:at], *later]
        if len(points) > MOST_POINTS:
            del points[_straightest(points)]
        return UtilityCurve(tuple(b for b, _ in points), tuple(min(m, 1.0) for _, m in points))


def _straightest(points: list[tuple[int, float]]) -> int:
    """The inner point whose absence changes a curve least."""

    def bend(i: int) -> float:
        (left, low), (at, mass), (right, high) = points[i - 1 : i + 2]
        return abs(mass - low - (high - low) * (at - left) / (right - left))

    return min(range(1, len(points) - 1), key=bend)


def still_held(retained: float, logical_then: int, logical_now: int) -> float:
    """Share of its utility that a request holds after it has grown since its last compaction.

    Parameters
    ----------
    retained: share that compaction left (`UtilityCurve.retained` of its cut curve).
    logical_then, logical_now: tokens the model had seen at the compaction and has seen now.

    Returns
    -------
    A share in [0, 1]. Tokens are taken to be worth the same on average, so the loss weighs less as a request grows; the
    true total is unknown, since nobody scores what is gone.
    """
    return 1 - (1 - retained) * logical_then / logical_now
