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
    mode, dealing, scorer: as in the configuration, or as the request asked.
    curve: what its blocks are worth, cut by the compactions since; None as long as no worker has answered.
    tried_at: tokens it had seen at its last compaction, done or skipped; None before the first.
    asked_at: tokens it had seen when a worker was last asked for a curve; None before the first.
    """

    budget: Budget
    mode: str
    dealing: str
    scorer: str
    curve: UtilityCurve | None = None
    tried_at: int | None = None
    asked_at: int | None = None
    _lost_at: int = 0
    _retained: float = 1.0
    _pending: bool = False

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

    def ask(self, logical_len: int) -> None:
        """A probe is on its way."""
        self.asked_at, self._pending = logical_len, True

    def answer(self, curve: UtilityCurve) -> None:
        """A worker's answer. Ignored if the request was compacted or preempted after it was asked."""
        if not self._pending or self.asked_at is None:
            return
        self._pending = False
        self.curve = curve.scaled(still_held(self._retained, self._lost_at, max(self.asked_at, 1)))

    def compacted(self, logical_len: int, blocks: int, held: int) -> None:
        """Its blocks were cut from ``held`` to ``blocks``; an answer to an earlier probe no longer fits."""
        self.tried_at, self._pending = logical_len, False
        if self.curve is not None:
            # Blocks that no curve covers were kept on top of the judged ones.
            judged = max(blocks - max(held - self.curve.held, 0), 1)
            self.curve = self.curve.cut(judged)
            self._retained, self._lost_at = self.curve.retained, logical_len

    def skipped(self, logical_len: int) -> None:
        """A compaction was due but could not be done: do not try again at once."""
        self.tried_at = logical_len

    def start_over(self) -> None:
        """Preempted: everything is computed again, densely."""
        self.curve = self.tried_at = self.asked_at = None
        self._lost_at, self._retained, self._pending = 0, 1.0, False

    def holding(self, request_id: str, held: int, logical_len: int, resident_len: int, block_size: int) -> Holding:
        """Its part in a decision about the whole pool; ``held`` blocks, the lengths in tokens."""
        judged = self.curve.held if self.curve is not None else resident_len // block_size
        floor = max(cdiv(self.budget.least_tokens(logical_len, block_size), block_size), 1)
        deserved = cdiv(self.budget.deserved_tokens(logical_len, resident_len, block_size, self.curve), block_size)
        return Holding(
            request_id=request_id,
            held=held,
            fixed=max(held - judged, 0),
            floor=floor,
            deserved=max(deserved, floor),
            curve=self.curve,
            age=None if self.tried_at is None else logical_len - self.tried_at,
        )
