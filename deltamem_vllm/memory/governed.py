# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the scheduler remembers of one request the policy applies to: its budget, and what its memory is worth."""

from __future__ import annotations

from dataclasses import dataclass

from deltamem_vllm.memory.budgets import Budget, cdiv
from deltamem_vllm.memory.curves import UtilityCurve, still_held
from deltamem_vllm.memory.pressure import Holding


@dataclass
class Governed:
    """One request.

    Attributes
    ----------
    budget: what it deserves and the least it is left with.
    mode, dealing, scorer, cold: as in the configuration, or as the request asked.
    curve: what its blocks were worth when a worker last looked or it was last compacted, cut by all compactions; None
        as long as no worker has answered.
    tried_at: tokens it had seen at its last compaction, done or skipped; None before the first.
    asked_at: tokens it had seen when a worker was last asked for a curve; None before the first.
    compactions: done since it arrived.
    """

    budget: Budget
    mode: str
    dealing: str
    scorer: str
    cold: bool = False
    curve: UtilityCurve | None = None
    tried_at: int | None = None
    asked_at: int | None = None
    compactions: int = 0
    _drawn_at: int = 0
    """Tokens it had seen when ``curve`` was right."""
    _lost_at: int = 0
    _retained: float = 1.0
    _pending: bool = False
    _share_asked: float = 1.0
    """Of its utility, what it still held when it was asked about."""
    _cut: tuple[int, int] | None = None
    """Blocks that a compaction left since a worker was asked, and tokens seen by then; None if there was none."""
    _grown: UtilityCurve | None = None
    """``curve`` with the blocks written since, kept until there is one more."""

    def wants_curve(self, logical_len: int, resident_len: int, block_size: int) -> bool:
        """Whether a worker should be asked (again) what the request's blocks are worth.

        Only where pages are dealt, and not while an answer is on its way. Again when an interval of tokens, at least
        a block, was written since.
        """
        if self._pending or self.dealing == "equal":
            return False
        if self.curve is None:
            return True
        fresh = max(self.budget.interval, block_size)
        # What has just been compacted is known from the curve that the decision was made with.
        seen = max(self.asked_at or 0, self.tried_at or 0)
        return logical_len - seen >= fresh and resident_len - self.curve.held * block_size >= fresh

    def wants_look(self, logical_len: int, resident_len: int, block_size: int) -> bool:
        """Whether a worker should be asked before memory is taken from the request.

        Prices do not need what coverage does: blocks written since are estimated (`curve_now`). So only if nobody has
        looked yet, or so long ago that most of what it has seen is new.
        """
        if self._pending or self.dealing == "equal":
            return False
        if self.curve is None or self.asked_at is None or logical_len >= 2 * self.asked_at:
            return True
        needed = self.budget.wants_curve(resident_len, block_size, self.curve)
        return needed and self.wants_curve(logical_len, resident_len, block_size)

    def curve_now(self, logical_len: int, whole: int) -> UtilityCurve | None:
        """What its ``whole`` full blocks are worth, those included that were written since anyone looked."""
        if self.curve is None or whole <= self.curve.held:
            return self.curve
        if self._grown is None or self._grown.held != whole:
            self._grown = self.curve.grown(whole - self.curve.held, 1 - self._drawn_at / logical_len)
        return self._grown

    def ask(self, logical_len: int) -> None:
        """A probe is on its way."""
        self.asked_at, self._pending, self._cut = logical_len, True, None
        self._share_asked = still_held(self._retained, self._lost_at, max(logical_len, 1))

    def answer(self, curve: UtilityCurve) -> None:
        """A worker's answer. Ignored if the request was preempted after it was asked."""
        if not self._pending or self.asked_at is None:
            return
        self._pending, self._drawn_at, self._grown = False, self.asked_at, None
        self.curve = curve.scaled(self._share_asked)
        if self._cut is not None:
            self._cut_curve(self.curve, *self._cut)

    def compacted(self, logical_len: int, blocks: int, whole: int) -> None:
        """Its ``whole`` full blocks were cut to ``blocks``; so will be the answer to an earlier probe."""
        self.tried_at = logical_len
        self.compactions += 1
        if self._pending:
            self._cut = (blocks if self._cut is None else min(self._cut[0], blocks), logical_len)
        curve = self.curve_now(logical_len, whole)
        if curve is not None:
            self._cut_curve(curve, blocks, logical_len)

    def _cut_curve(self, curve: UtilityCurve, blocks: int, logical_len: int) -> None:
        self.curve = curve.cut(max(blocks, 1))
        self._retained, self._lost_at, self._drawn_at = self.curve.retained, logical_len, logical_len
        self._grown = None

    def skipped(self, logical_len: int) -> None:
        """A compaction was due but could not be done: do not try again at once."""
        self.tried_at = logical_len

    def start_over(self) -> None:
        """Preempted: everything is computed again, densely."""
        self.curve = self.tried_at = self.asked_at = self._cut = self._grown = None
        self._drawn_at, self._lost_at, self._retained, self._pending = 0, 0, 1.0, False

    def holding(self, request_id: str, held: int, logical_len: int, resident_len: int, block_size: int) -> Holding:
        """Its part in a decision about the whole pool; ``held`` blocks, the lengths in tokens."""
        whole = resident_len // block_size
        curve = self.curve_now(logical_len, whole)
        floor = max(cdiv(self.budget.least_tokens(logical_len, block_size), block_size), 1)
        deserved = cdiv(self.budget.deserved_tokens(logical_len, resident_len, block_size, self.curve), block_size)
        return Holding(
            request_id=request_id,
            held=held,
            fixed=max(held - whole, 0),
            floor=floor,
            deserved=max(deserved, floor),
            curve=curve,
            age=None if self.tried_at is None else logical_len - self.tried_at,
        )
