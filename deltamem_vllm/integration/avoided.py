# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Preemptions that a step's compactions avoided: vLLM's loop on the blocks before and after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.request import Request

from deltamem_vllm.integration.manager import DeltaMemManager
from deltamem_vllm.memory.budgets import cdiv
from deltamem_vllm.memory.plans import CompactionPlan
from deltamem_vllm.memory.preemption import Asker, preemptions


def new_tokens(request: Request, tokens_left: int, scheduler_config: Any) -> int:
    """Tokens that vLLM's next step computes of a running request, of the ``tokens_left`` that it still may."""
    flying = request.num_output_placeholders
    last = request.num_prompt_tokens + request.max_tokens
    if flying > 0 and request.num_computed_tokens + 2 - flying >= last:
        return 0  # the step in flight is known to be its last
    new = request.num_tokens + flying - request.num_computed_tokens
    threshold: int = scheduler_config.long_prefill_token_threshold
    return max(min(new, threshold if threshold > 0 else new, tokens_left), 0)


def preemptions_avoided(
    running: Sequence[Request],
    manager: DeltaMemManager,
    plans: Sequence[CompactionPlan],
    free_before: int,
    scheduler_config: Any,
) -> int:
    """Running requests that vLLM would have preempted in this step without ``plans``, less those it preempts anyway.

    Parameters
    ----------
    running: in vLLM's order.
    manager: of the blocks, after the compactions.
    plans: this step's compactions, at most one of each request; without any the answer is 0.
    free_before: free blocks before them.
    scheduler_config: vLLM's.
    """
    order = list(range(len(running)))[::-1]
    if scheduler_config.policy == "priority":
        # vLLM takes the first of equals.
        order.sort(key=lambda i: (-running[i].priority, -running[i].arrival_time, i))
    compacted = {plan.request_id: plan for plan in plans}
    before = _askers(running, manager, compacted, scheduler_config)
    without = preemptions(before, order, free_before, manager.reserve)
    if not without:
        return 0
    after = _askers(running, manager, {}, scheduler_config)
    free = manager.block_pool.get_num_free_blocks()
    return max(without - preemptions(after, order, free, manager.reserve), 0)


def _askers(
    running: Sequence[Request],
    manager: DeltaMemManager,
    undone: Mapping[str, CompactionPlan],
    scheduler_config: Any,
) -> list[Asker]:
    """What each running request holds and asks for, as if the compactions ``undone`` had not been."""
    tokens_left: int = scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    askers = []
    for request in running:
        new = new_tokens(request, tokens_left, scheduler_config)
        tokens_left -= new
        plan = undone.get(request.request_id)
        if plan is not None:
            resident, held = plan.resident_before, len(plan.source_blocks)
        else:
            resident = request.num_computed_tokens - manager.evicted.get(request.request_id, 0)
            held = len(manager.req_to_blocks[request.request_id])
        askers.append(Asker(held, max(cdiv(resident + new, manager.block_size) - held, 0) if new else 0))
    return askers
