# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How many blocks one request can need at once: the bound that lets a prompt longer than the pool be admitted."""

from __future__ import annotations

from deltamem_vllm.memory.budgets import Budget, cdiv


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
