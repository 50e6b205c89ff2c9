# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How much a request deserves, the least it is left with, and when it is held to that.

Two ways to count. Where every head keeps the same number (`FixedBudget`), a budget is any number of tokens. Where pages
are dealt (`DealtBudget`), it is whole blocks, because a page is the smallest thing a head can be given; only there can
the content of a request decide how many (coverage). Answers are nominal tokens in both: what a block table counts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.request_options import RequestOptions


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)


@dataclass(frozen=True)
class Budget(ABC):
    """How much of a request stays resident.

    Attributes
    ----------
    keep_ratio: share of the logical tokens that stays resident, in (0, 1].
    min_tokens: a request that has seen fewer tokens is left alone.
    sink_tokens, recent_tokens: resident tokens at either end that always survive.
    interval: hysteresis in tokens: after its first compaction a request may exceed its target by this much before
        it is compacted again.
    keep_tokens: tokens that stay resident, instead of the share; None for the share.
    """

    keep_ratio: float
    min_tokens: int
    sink_tokens: int
    recent_tokens: int
    interval: int
    keep_tokens: int | None = None

    @property
    def untouched_tokens(self) -> int:
        """A request that has seen at most this many tokens is never compacted, however short memory is."""
        return max(self.min_tokens, self.keep_tokens or 0)

    def target(self, logical_len: int) -> int:
        """Tokens that the fixed share keeps at ``logical_len`` seen tokens, before any rounding to blocks."""
        if logical_len < self.min_tokens:
            return logical_len
        share = self.keep_tokens
        if share is None:
            share = math.ceil(self.keep_ratio * logical_len - 1e-9)  # 0.1 * 4096 is 409.6000000000001
        return min(logical_len, max(share, self.sink_tokens + self.recent_tokens, 1))

    def wants_curve(self, resident_len: int, block_size: int, curve: UtilityCurve | None) -> bool:
        """Whether the budget needs a (newer) curve before it can say what is due; only one with coverage does."""
        return False

    @abstractmethod
    def least_tokens(self, logical_len: int, block_size: int) -> int:
        """Resident tokens right after a compaction that memory forces; ``logical_len`` if none may be."""

    @abstractmethod
    def deserved_tokens(
        self, logical_len: int, resident_len: int, block_size: int, curve: UtilityCurve | None = None
    ) -> int:
        """Resident tokens right after a compaction that nothing forces; at least `least_tokens`.

        Parameters
        ----------
        logical_len, resident_len: tokens seen and held (nominal) now.
        block_size: tokens of one block.
        curve: the newest curve of the request, cut by its compactions since; None if there is none yet.
        """

    def due(
        self, logical_len: int, resident_len: int, block_size: int, curve: UtilityCurve | None = None
    ) -> int | None:
        """Tokens to keep if a request whose prompt is done should be compacted now, else None.

        The first compaction runs as soon as it frees a block; later ones wait for ``interval`` tokens. For mode
        ``always``; under ``pressure`` nothing is due, memory is taken (`memory.pressure`). Parameters as in
        `deserved_tokens`.
        """
        target = self.deserved_tokens(logical_len, resident_len, block_size, curve)
        slack = self.interval if resident_len < logical_len else 1
        return self._if_worth(target, resident_len, block_size) if resident_len - target >= slack else None

    def due_when_short(self, logical_len: int, resident_len: int, block_size: int) -> int | None:
        """Tokens to keep if memory is short and this request can give a block back before its interval is over."""
        return self._if_worth(self.least_tokens(logical_len, block_size), resident_len, block_size)

    @staticmethod
    def _if_worth(target: int, resident_len: int, block_size: int) -> int | None:
        frees_a_block = cdiv(target, block_size) < cdiv(resident_len, block_size)
        return target if frees_a_block else None


@dataclass(frozen=True)
class FixedBudget(Budget):
    """The same number of tokens for every layer and head (dealing ``equal``)."""

    def least_tokens(self, logical_len: int, block_size: int) -> int:
        return self.target(logical_len)

    def deserved_tokens(
        self, logical_len: int, resident_len: int, block_size: int, curve: UtilityCurve | None = None
    ) -> int:
        return self.target(logical_len)


@dataclass(frozen=True)
class DealtBudget(Budget):
    """Whole blocks, whose pages are dealt to the (layer, kv head) pairs.

    Attributes
    ----------
    coverage: share of its utility that a request deserves, in (0, 1]; None for the fixed share.
    max_keep_ratio: most of the logical tokens that coverage may keep, in (0, 1].
    """

    coverage: float | None = None
    max_keep_ratio: float = 1.0

    def floor_blocks(self, block_size: int) -> int:
        """Pages every pair gets, so that its protected tokens fit: the fewest blocks a request can be cut to."""
        return max(cdiv(self.sink_tokens + self.recent_tokens, block_size), 1)

    def least_blocks(self, logical_len: int, block_size: int) -> int:
        """Blocks right after a compaction that memory forces; all of them if the request is to be left alone."""
        share = self.keep_ratio * logical_len if self.keep_tokens is None else self.keep_tokens
        return self._blocks(share, logical_len, block_size)

    def most_blocks(self, logical_len: int, block_size: int) -> int:
        """Most blocks that the request can deserve."""
        least = self.least_blocks(logical_len, block_size)
        if self.coverage is None:
            return least
        return max(least, self._blocks(self.max_keep_ratio * logical_len, logical_len, block_size))

    def target_blocks(
        self, logical_len: int, block_size: int, curve: UtilityCurve | None = None, newer: int = 0
    ) -> int:
        """Blocks the request deserves.

        Parameters
        ----------
        logical_len: tokens seen.
        block_size: tokens of one block.
        curve: what its blocks are worth; None if nobody has looked yet. It then deserves the most it may.
        newer: blocks written since the curve was drawn. Nobody has scored them, so coverage keeps them.
        """
        least, most = self.least_blocks(logical_len, block_size), self.most_blocks(logical_len, block_size)
        if self.coverage is None:
            return least
        return coverage_blocks(curve, self.coverage, least, most, newer) if curve is not None else most

    def wants_curve(self, resident_len: int, block_size: int, curve: UtilityCurve | None) -> bool:
        """As the base class: there is no curve, or an interval of tokens, at least a block, was written since."""
        if self.coverage is None:
            return False
        return curve is None or resident_len - curve.held * block_size >= max(self.interval, block_size)

    def least_tokens(self, logical_len: int, block_size: int) -> int:
        return min(self.least_blocks(logical_len, block_size) * block_size, logical_len)

    def deserved_tokens(
        self, logical_len: int, resident_len: int, block_size: int, curve: UtilityCurve | None = None
    ) -> int:
        newer = max(cdiv(resident_len, block_size) - curve.held, 0) if curve is not None else 0
        return min(self.target_blocks(logical_len, block_size, curve, newer) * block_size, logical_len)

    def _blocks(self, share: float, logical_len: int, block_size: int) -> int:
        """``share`` tokens in whole blocks: rounded down, since what is asked for is an upper bound on memory."""
        everything = cdiv(logical_len, block_size)
        if logical_len < self.min_tokens or share >= logical_len:
            return everything
        return min(max(int((share + 1e-9) // block_size), self.floor_blocks(block_size)), everything)


def coverage_blocks(curve: UtilityCurve, coverage: float, least: int, most: int, newer: int = 0) -> int:
    """Fewest blocks that retain ``coverage`` of a request's utility, between ``least`` and ``most``.

    ``newer`` blocks were written after the curve was drawn and are kept on top of it.
    """
    return min(max(curve.fewest(coverage) + newer, least), most)


def budget_for(options: RequestOptions, config: DeltaMemConfig) -> FixedBudget | DealtBudget | None:
    """The budget of a request with these options; None if the policy is off for it."""
    if not options.enabled:
        return None
    fixed = FixedBudget(
        keep_ratio=options.keep_ratio,
        min_tokens=options.min_tokens,
        sink_tokens=config.sink_tokens,
        recent_tokens=config.recent_tokens,
        interval=config.interval,
        keep_tokens=options.keep_tokens,
    )
    if options.dealing == "equal":
        return fixed
    return DealtBudget(**vars(fixed), coverage=options.coverage, max_keep_ratio=config.max_keep_ratio)
