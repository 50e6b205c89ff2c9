# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A worker without a model: it stores, for every slot of the pool, which token was written there.

It learns everything from ``SchedulerOutput``, as a real worker does, so it also checks the protocol between
scheduler and worker. A token's identity is the whole prefix that produced it; a token computed after an eviction
depends on what was evicted and gets an identity of its own, which no other request may ever find.
"""

from __future__ import annotations

import random
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput


class SimulatedWorker:
    """Executes scheduler outputs on symbolic tokens.

    Attributes
    ----------
    slots: (block, slot) -> identity of the token stored there.
    """

    def __init__(self, block_size: int, seed: int) -> None:
        self._size = block_size
        self._random = random.Random(seed)
        self.slots: dict[tuple[int, int], Any] = {}
        self._blocks: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}
        self._resident: dict[str, list[Any]] = {}
        self._epoch: dict[str, int] = {}

    def execute(self, output: Any, requests: dict[str, Any]) -> ModelRunnerOutput:
        """One step; raises AssertionError when a request would read anything but its own resident tokens."""
        for gone in output.finished_req_ids | (output.preempted_req_ids or set()):
            for table in (self._blocks, self._tokens, self._resident):
                table.pop(gone, None)
        plans = {plan.request_id: plan for plan in output.deltamem.compactions}
        for plan in output.deltamem.compactions:
            self._compact(plan)
        self._update_tables(output, plans)
        for request_id, plan in plans.items():
            if request_id in self._blocks:
                self._blocks[request_id] = list(plan.blocks_after)
        sampled = [self._run(r, n, output, requests[r]) for r, n in output.num_scheduled_tokens.items()]
        ids = list(output.num_scheduled_tokens)
        # Each layer writes the step's tokens of all requests before any of them reads.
        for request_id in ids:
            self._check_reads(request_id)
        return ModelRunnerOutput(
            req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=sampled
        )

    def _update_tables(self, output: Any, plans: dict[str, Any]) -> None:
        for new in output.scheduled_new_reqs:
            self._start(new.req_id, new.block_ids[0], new.num_computed_tokens, list(new.prompt_token_ids))
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if request_id in cached.resumed_req_ids:
                tokens = list(cached.all_token_ids[request_id])
                self._start(request_id, blocks[0], cached.num_computed_tokens[i], tokens)
            elif blocks is not None and request_id not in plans:
                self._blocks[request_id] += blocks[0]

    def _start(self, request_id: str, blocks: list[int], computed: int, tokens: list[int]) -> None:
        self._blocks[request_id] = list(blocks)
        self._tokens[request_id] = tokens
        self._epoch[request_id] = self._epoch.get(request_id, 0) + 1
        # A prefix hit: the blocks must hold exactly the dense KV of this prompt.
        self._resident[request_id] = [tuple(tokens[: i + 1]) for i in range(computed)]

    def _compact(self, plan: Any) -> None:
        old = self._resident[plan.request_id]
        assert len(old) == plan.resident_before, "the scheduler counts other tokens than the worker holds"
        held = [self.slots[plan.source_blocks[i // self._size], i % self._size] for i in range(len(old))]
        assert held == old, "a source block was overwritten before its compaction"
        middle = range(plan.sink_tokens, len(old) - plan.recent_tokens)
        chosen = self._random.sample(middle, plan.keep - plan.sink_tokens - plan.recent_tokens)
        kept = sorted({*range(plan.sink_tokens), *chosen, *range(len(old) - plan.recent_tokens, len(old))})
        assert len(kept) == plan.keep
        self._resident[plan.request_id] = [old[i] for i in kept]
        for j, identity in enumerate(self._resident[plan.request_id]):
            self.slots[plan.target_blocks[j // self._size], j % self._size] = identity

    def _run(self, request_id: str, count: int, output: Any, request: Any) -> list[int]:
        evicted = output.deltamem.evicted.get(request_id, 0)
        tokens, resident, blocks = (t[request_id] for t in (self._tokens, self._resident, self._blocks))
        end = request.num_computed_tokens  # vLLM has already advanced it
        first = end - count
        assert len(resident) == first - evicted, "resident and logical lengths disagree"
        for position in range(first, end):
            own = (request_id, self._epoch[request_id], position)
            identity = own if evicted else tuple(tokens[: position + 1])
            where = position - evicted
            self.slots[blocks[where // self._size], where % self._size] = identity
            resident.append(identity)
        if end < len(tokens):
            return []
        token = self._random.randrange(1000)
        tokens.append(token)
        return [token]

    def _check_reads(self, request_id: str) -> None:
        blocks, expected = self._blocks[request_id], self._resident[request_id]
        found = [self.slots.get((blocks[i // self._size], i % self._size)) for i in range(len(expected))]
        assert found == expected, f"{request_id} would read tokens that are not its own"
