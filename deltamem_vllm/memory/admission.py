# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How many blocks a request can need at once, so that a prompt longer than the pool may start, and how many in the end,
so that no more requests start than can run to theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltamem_vllm.memory.budgets import Budget, cdiv

FORESEEN_TOKENS = 1024
"""Output that admission reckons with, at most: clients often allow far more than they get."""


def reserve_blocks(budget: Budget | None, max_len: int, block_size: int) -> int:
    """Free blocks an out-of-place compaction of a request of up to ``max_len`` tokens needs to start.

    Zero for a request that is never compacted (policy off, or a budget that keeps everything). What coverage keeps
    beyond the least is not reserved: a copy that large is only made while memory is not short.
    """
    if budget is None:
        return 0
    least = budget.least_tokens(max_len, block_size)
    return cdiv(least, block_size) if least < max_len else 0


def peak_blocks(
    budget: Budget | None,
    prompt_len: int,
    max_new_tokens: int,
    block_size: int,
    chunk_tokens: int,
    max_model_len: int,
) -> int:
    """Most blocks a request holds at once when it is compacted as early as it has to be.

    Parameters
    ----------
    budget: the request's budget; None if the policy is off for it (it then holds every token).
    prompt_len, max_new_tokens: tokens.
    block_size: tokens of one block.
    chunk_tokens: most tokens written between two compactions (vLLM's ``max_in_flight_tokens``).
    max_model_len: tokens; caps prompt plus output.

    Returns
    -------
    Blocks: what is resident before a compaction (what the last one left, in tokens or whole dealt blocks, or all that
    was seen before eviction may start, plus one chunk or one decode interval) and the fresh blocks of the copy.
    """
    total = min(prompt_len + max_new_tokens, max_model_len)
    dense = cdiv(total, block_size)
    if budget is None or budget.least_tokens(total, block_size) >= total:
        return dense
    held = max(budget.least_tokens(total, block_size), budget.untouched_tokens)
    held += max(chunk_tokens, budget.interval + 1)
    return min(dense, cdiv(held, block_size) + reserve_blocks(budget, total, block_size))


@dataclass(frozen=True)
class Ahead:
    """Blocks that requests go on to need.

    Attributes
    ----------
    least: however much memory is taken from them.
    whole: if none is.
    """

    least: int
    whole: int

    def __add__(self, other: Ahead) -> Ahead:
        return Ahead(self.least + other.least, self.whole + other.whole)


def blocks_ahead(budget: Budget, prompt_len: int, max_new_tokens: int, block_size: int, max_model_len: int) -> Ahead:
    """What a request of mode ``pressure`` goes on to need.

    Requests are small when they start, so a pool that memory is taken in seems to have room for many; but what each
    must keep grows with it. With more of them than the pool can hold at their least, the last tokens of each would be
    bought with a compaction a block, and in the end with preemptions.

    Parameters
    ----------
    budget: the request's budget.
    prompt_len, max_new_tokens: tokens; of the latter at most `FORESEEN_TOKENS` are reckoned with.
    block_size: tokens of one block.
    max_model_len: tokens; caps prompt plus output.

    Returns
    -------
    Blocks at that length: what a compaction leaves and one that it grows by before the next, and all.
    """
    total = min(prompt_len + min(max_new_tokens, FORESEEN_TOKENS), max_model_len)
    whole = cdiv(total, block_size)
    return Ahead(min(cdiv(budget.least_tokens(total, block_size), block_size) + 1, whole), whole)
