# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The ``fixed`` budget: how many tokens a request keeps, and when it is held to that."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.request_options import RequestOptions


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)


@dataclass(frozen=True)
class FixedBudget:
    """Hold a request to ``keep_ratio`` of the tokens it has seen.

    Attributes
    ----------
    keep_ratio: share of the logical tokens that stays resident, in (0, 1].
    min_tokens: a request that has seen fewer tokens is left alone.
    sink_tokens, recent_tokens: resident tokens at either end that always survive.
    interval: hysteresis in tokens: after its first compaction a request may exceed its target by this much before
        it is compacted again.
    """

    keep_ratio: float
    min_tokens: int
    sink_tokens: int
    recent_tokens: int
    interval: int

    def target(self, logical_len: int) -> int:
        """Resident tokens right after a compaction at ``logical_len`` seen tokens."""
        if logical_len < self.min_tokens:
            return logical_len
        share = math.ceil(self.keep_ratio * logical_len - 1e-9)  # 0.1 * 4096 is 409.6000000000001
        return min(logical_len, max(share, self.sink_tokens + self.recent_tokens, 1))

    def due(self, logical_len: int, resident_len: int, block_size: int) -> int | None:
        """Tokens to keep if a request whose prompt is done should be compacted now, else None.

        The first compaction runs as soon as it frees a block; later ones wait for ``interval`` tokens.
        """
        target = self.target(logical_len)
        slack = self.interval if resident_len < logical_len else 1
        return self._if_worth(target, resident_len, block_size) if resident_len - target >= slack else None

    def due_when_short(self, logical_len: int, resident_len: int, block_size: int) -> int | None:
        """Tokens to keep if memory is short and this request can give a block back before its interval is over."""
        return self._if_worth(self.target(logical_len), resident_len, block_size)

    @staticmethod
    def _if_worth(target: int, resident_len: int, block_size: int) -> int | None:
        frees_a_block = cdiv(target, block_size) < cdiv(resident_len, block_size)
        return target if frees_a_block else None


def budget_for(options: RequestOptions, config: DeltaMemConfig) -> FixedBudget | None:
    """The budget of a request with these options; None if the policy is off for it."""
    if not options.enabled:
        return None
    return FixedBudget(
        keep_ratio=options.keep_ratio,
        min_tokens=options.min_tokens,
        sink_tokens=config.sink_tokens,
        recent_tokens=config.recent_tokens,
        interval=config.interval,
    )
