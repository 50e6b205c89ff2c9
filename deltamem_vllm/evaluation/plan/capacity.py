# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How many requests of which length a pool of KV blocks holds, by deltamem's own rules.

Whole blocks throughout. A request is counted at its peak while its prompt is read and at rest afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deltamem_vllm.evaluation.plan.errors import PlanError
from deltamem_vllm.memory.admission import peak_blocks, reserve_blocks
from deltamem_vllm.memory.budgets import Budget, DealtBudget, cdiv

MAX_RESERVE_SHARE = 1 / 8
"""The policy's limit on the reserve for compactions; a test compares the two."""


@dataclass(frozen=True)
class Treatment:
    """What is done with the KV cache.

    Attributes
    ----------
    name: for tables.
    element_bytes: of one stored key or value.
    flags: of `vllm serve`.
    budget: deltamem's budget of each request; None for stock vLLM.
    """

    name: str
    element_bytes: int
    flags: tuple[str, ...] = ()
    budget: Budget | None = None

    @property
    def dealt(self) -> bool:
        """Whether pages are dealt to layers and heads, which takes page tables."""
        return isinstance(self.budget, DealtBudget)


@dataclass(frozen=True)
class Pool:
    """The blocks of one rank; all ranks have the same number."""

    blocks: int
    block_size: int

    @classmethod
    def of(cls, available: int, token_bytes: int, block_size: int) -> Pool:
        """The pool that vLLM makes of ``available`` bytes; ``token_bytes`` is one token's KV in every layer."""
        return cls(max(0, available // (token_bytes * block_size)), block_size)

    @property
    def usable(self) -> int:
        """Blocks for requests: vLLM keeps one, the null block, for itself."""
        return max(0, self.blocks - 1)

    @property
    def tokens(self) -> int:
        return self.usable * self.block_size

    def logged_concurrency(self, context: int) -> float:
        """The "Maximum concurrency" that stock vLLM logs for a --max-model-len of ``context`` tokens."""
        return self.blocks / cdiv(context, self.block_size)


@dataclass(frozen=True)
class Load:
    """Requests of one length, prompt and output together.

    Attributes
    ----------
    pool: of a server whose --max-model-len is ``context``.
    requests: held at once, one of them still reading its prompt.
    limited: whether --max-num-seqs is what bounds it.
    compacted_while_read: whether the prompt is longer than the pool, so that parts of it are evicted before the end
        of the prompt has been seen.
    """

    context: int
    pool: Pool
    requests: int
    limited: bool
    compacted_while_read: bool


def needed_blocks(budget: Budget | None, context: int, block_size: int, chunk_tokens: int) -> int:
    """Blocks of the smallest pool that serves one request of this length."""
    return peak_blocks(budget, context, 0, block_size, chunk_tokens, context)


def resting_blocks(budget: Budget | None, context: int, block_size: int) -> int:
    """Blocks a request of this length holds at most once memory is short: what it is left with and an interval.

    In mode ``pressure`` it holds more as long as others do not need the room.
    """
    if budget is None:
        return cdiv(context, block_size)
    return cdiv(min(context, budget.least_tokens(context, block_size) + budget.interval), block_size)


def admission_blocks(budget: Budget | None, context: int, pool: Pool, chunk_tokens: int) -> int:
    """Free blocks the scheduler wants before it starts a prompt of this length (see `integration/policy.py`)."""
    size = pool.block_size
    dense = cdiv(context, size)
    if dense > pool.usable:
        return needed_blocks(budget, context, size, chunk_tokens)
    reserve = reserve_blocks(budget, context, size)
    return dense + min(reserve, int(pool.usable * MAX_RESERVE_SHARE), pool.usable - dense)


def load_of(pool: Pool, treatment: Treatment, context: int, max_num_seqs: int, chunk_tokens: int) -> Load:
    """How many requests of ``context`` tokens the pool holds at once: all at rest but one, which is at its peak."""
    start = admission_blocks(treatment.budget, context, pool, chunk_tokens)
    rest = resting_blocks(treatment.budget, context, pool.block_size)
    fits = 0 if start > pool.usable else 1 + (pool.usable - start) // rest
    return Load(
        context=context,
        pool=pool,
        requests=min(fits, max_num_seqs),
        limited=fits > max_num_seqs,
        compacted_while_read=fits > 0 and cdiv(context, pool.block_size) > pool.usable,
    )


def longest_context(
    pool_for: Callable[[int], Pool], treatment: Treatment, max_positions: int, chunk_tokens: int
) -> int:
    """Longest request that is served alone, up to the model's own limit; 0 if none.

    ``pool_for`` is the pool for a --max-model-len; longer ones never get a larger pool.
    """

    def fits(context: int) -> bool:
        pool = pool_for(context)
        return needed_blocks(treatment.budget, context, pool.block_size, chunk_tokens) <= pool.usable

    low, high = 0, max_positions
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def parse_context(text: str) -> int:
    """Tokens: 8192, or 8k for 8 * 1024."""
    lowered = text.strip().lower()
    digits, factor = (lowered[:-1], 1024) if lowered.endswith("k") else (lowered, 1)
    if not digits.isascii() or not digits.isdigit() or int(digits) < 1:
        raise PlanError(f"--context: got {text!r}, allowed: tokens such as 8192 or 8k")
    return int(digits) * factor
