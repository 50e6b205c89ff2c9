# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Checks of the block pool that must hold after every scheduling step."""

from __future__ import annotations

from collections import Counter
from typing import Any


class PoolChecks:
    """Looks at a scheduler after every ``schedule()``, beginning with its first.

    Parameters
    ----------
    scheduler: vLLM's scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        # Request -> (blocks its last compaction gave it, tokens it had seen then, serial), for dealt pages.
        self._dealt: dict[str, tuple[int, int, int]] = {}
        self._last_serial = 0

    def check(self, output: Any) -> None:
        """Every block is free or owned, reference counts balance, and no step writes a block that others read.

        Parameters
        ----------
        output: what ``schedule()`` has just returned.
        """
        (manager,) = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        pool = manager.block_pool
        owners: Counter[int] = Counter()
        for blocks in manager.req_to_blocks.values():
            owners.update(block.block_id for block in blocks if not block.is_null)
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)), "a block is twice in the free queue"
        assert pool.get_num_free_blocks() == len(free), "the free counter disagrees with the free queue"
        assert len(free) + len(owners) + 1 == pool.num_gpu_blocks, "a block is neither free nor owned, or both"
        assert not owners.keys() & set(free), "a block is free and owned"
        for block in pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == owners[block.block_id], f"block {block.block_id} has a wrong reference count"
        _check_writes(self._scheduler, output, manager)
        if hasattr(output, "deltamem"):
            self._check_dealt(output.deltamem, manager)

    def _check_dealt(self, step: Any, manager: Any) -> None:
        """A request with dealt pages owns their blocks and those of its tail, alone, and not one block more."""
        for plan in step.compactions:
            self._dealt.pop(plan.request_id, None)
            if plan.dealing == "equal":
                continue
            blocks = len(plan.target_blocks)
            assert plan.keep == blocks * manager.block_size, f"{plan.request_id}: {plan.keep} tokens in {blocks} blocks"
            assert plan.serial > self._last_serial, f"serial {plan.serial} after {self._last_serial}"
            self._last_serial = plan.serial
            self._dealt[plan.request_id] = (blocks, plan.logical_len, plan.serial)
        # A preempted request starts over densely; one that ended is gone.
        self._dealt = {request_id: dealt for request_id, dealt in self._dealt.items() if request_id in manager.evicted}
        assert step.dealt == {request_id: dealt[2] for request_id, dealt in self._dealt.items()}, (
            "the step names other requests with dealt pages, or other serials, than its plans gave"
        )
        for request_id, (dealt, seen, _) in self._dealt.items():
            tail = self._scheduler.requests[request_id].num_computed_tokens - seen
            blocks = manager.req_to_blocks[request_id]
            wanted = dealt + -(-tail // manager.block_size)
            assert len(blocks) == wanted, f"{request_id} owns {len(blocks)} blocks, expected {wanted}"
            assert all(block.ref_cnt == 1 and block.block_hash is None for block in blocks), (
                f"{request_id} has dealt pages in a block that others may read"
            )


def _check_writes(scheduler: Any, output: Any, manager: Any) -> None:
    evicted = getattr(manager, "evicted", {})
    size = manager.block_size
    for request_id, count in output.num_scheduled_tokens.items():
        # After scheduling, num_computed_tokens already counts this step.
        end = scheduler.requests[request_id].num_computed_tokens - evicted.get(request_id, 0)
        blocks = manager.req_to_blocks[request_id]
        assert len(blocks) * size >= end, f"{request_id} has no block for the tokens of this step"
        for block in blocks[(end - count) // size : -(-end // size)]:
            # vLLM itself hashes a block when its last token is scheduled: another request of the same step may hit
            # it, and reads it after this step's writes. A compacted request's blocks are never shared.
            filled_now = block.block_hash is not None and request_id not in evicted
            assert block.ref_cnt == 1 or filled_now, (
                f"block {block.block_id} is written by {request_id} and read by others"
            )
    plan = getattr(output, "deltamem", None)
    for compaction in plan.compactions if plan is not None else ():
        for block_id in compaction.target_blocks:
            block = manager.block_pool.blocks[block_id]
            assert block.ref_cnt == 1, f"target block {block_id} of {compaction.request_id} has other owners"
            assert block.block_hash is None, f"target block {block_id} of {compaction.request_id} is a cache entry"
