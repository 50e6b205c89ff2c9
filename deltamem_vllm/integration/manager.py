# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The scheduler-side seam: a full-attention block manager that counts resident tokens.

vLLM goes on counting logical tokens everywhere; this manager subtracts one integer per request, ``evicted``, exactly
where tokens become blocks. Nothing else of vLLM's accounting changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from deltamem_vllm.memory.admission import Ahead
from deltamem_vllm.memory.budgets import cdiv
from deltamem_vllm.memory.tiers import ColdHeld


@dataclass(frozen=True)
class Admission:
    """What a waiting request must find free.

    Attributes
    ----------
    max_blocks: bound on the blocks it ever holds if it is compacted between prompt chunks; None for a request that
        must fit whole.
    reserve: free blocks its own compaction will need; asked for until it runs.
    ahead: what it goes on to need; None if it does not wait for that.
    """

    max_blocks: int | None
    reserve: int
    ahead: Ahead | None = None


class DeltaMemManager(FullAttentionManager):
    """vLLM's manager for full attention, for requests that hold fewer tokens than they have seen.

    Attributes
    ----------
    evicted: request id -> logical minus resident tokens, for compacted requests only.
    dealt: request id -> serial of its last compaction, for those whose pages were dealt.
    cold: request id -> what it holds in cold pages, as workers reported it after that compaction.
    admissions: request id -> Admission, for requests the policy applies to.
    reserve: blocks that allocation must leave free this step, so that the next out-of-place compaction can start.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evicted: dict[str, int] = {}
        self.dealt: dict[str, int] = {}
        self.cold: dict[str, ColdHeld] = {}
        self.admissions: dict[str, Admission] = {}
        self.reserve = 0

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens - self.evicted.get(request_id, 0), *args, **kwargs
        )
        if needed == 0:
            return 0
        admission = self.admissions.get(request_id)
        reserve = self.reserve
        if admission is not None:
            waiting = not self.req_to_blocks.get(request_id)
            if waiting and admission.ahead is not None:
                found = kwargs["new_computed_blocks"] if "new_computed_blocks" in kwargs else args[0]
                shared = sum(block.ref_cnt > 0 for block in found)
                if not self.may_start(admission.ahead, self.ahead(), shared):
                    return self.block_pool.num_gpu_blocks + needed  # more than there is
            if kwargs.get("apply_admission_cap") and admission.max_blocks is not None:
                # The bound already contains the room for the copy.
                return min(needed, admission.max_blocks)
            if waiting:
                reserve = max(reserve, admission.reserve)
        # vLLM compares the answer with the free blocks: asking for more leaves the reserve untouched.
        return needed + reserve

    def ahead(self) -> Ahead:
        """What the running requests go on to need, all together.

        Whole: what they hold now, blocks that several share counted once, and what they will still write.
        """
        least, whole = 0, self.block_pool.num_gpu_blocks - 1 - self.block_pool.get_num_free_blocks()
        for request_id, blocks in self.req_to_blocks.items():
            admission = self.admissions.get(request_id)
            if not blocks or admission is None or admission.ahead is None:
                least += len(blocks)
                continue
            least += admission.ahead.least
            written = len(blocks) + self.evicted.get(request_id, 0) // self.block_size
            whole += max(admission.ahead.whole - written, 0)
        return Ahead(least, whole)

    def may_start(self, ahead: Ahead, running: Ahead, shared: int = 0) -> bool:
        """Whether a waiting request will still fit when all have grown. Alone it always may: nothing would change.

        Parameters
        ----------
        ahead: of the request.
        running: of those that run, and of those that start before it.
        shared: blocks of its prompt that running requests hold already.
        """
        usable = self.block_pool.num_gpu_blocks - 1
        fits = min(running.least + ahead.least, running.whole + ahead.whole - shared) <= usable
        return fits or not any(self.req_to_blocks.values())

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        return super().allocate_new_blocks(request_id, num_tokens - self.evicted.get(request_id, 0), *args, **kwargs)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        # A compacted block's content no longer belongs to a position, and the KV of later tokens depends on what
        # was evicted: neither may ever be found by a prefix hash.
        if request.request_id not in self.evicted:
            super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        # Finish, abort and preemption all pass here: the request starts over as a dense one.
        self.evicted.pop(request_id, None)
        self.dealt.pop(request_id, None)
        self.cold.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def take_cold(self, held: Mapping[str, ColdHeld]) -> None:
        """Take over what workers reported; requests that left or start over meanwhile hold nothing."""
        self.cold.update((request_id, one) for request_id, one in held.items() if request_id in self.dealt)

    def cold_held(self) -> ColdHeld:
        """What all requests hold in cold pages."""
        return ColdHeld(sum(one.blocks for one in self.cold.values()), sum(one.tokens for one in self.cold.values()))

    def owned_share(self, request_id: str) -> float:
        """Blocks of the request, a block shared by k requests counted as 1/k."""
        return sum(1 / block.ref_cnt for block in self.req_to_blocks[request_id])

    def can_copy(self, keep: int) -> bool:
        """Whether the pool has the blocks for an out-of-place copy of ``keep`` tokens."""
        return self.block_pool.get_num_free_blocks() >= cdiv(keep, self.block_size)

    def can_pack(self, request_id: str) -> bool:
        """Whether the request is the only owner of all its blocks, so that they may be rewritten."""
        return all(not b.is_null and b.ref_cnt == 1 for b in self.req_to_blocks[request_id])

    def compact(self, request_id: str, keep: int, evicted: int, in_place: bool) -> tuple[Sequence[int], Sequence[int]]:
        """Swap the request's blocks for those of its survivors and free the rest.

        Fresh blocks are taken before the old ones are freed, so source and destination of one copy never overlap.
        Old blocks with a prefix hash stay valid cache entries until vLLM reuses them.

        Returns
        -------
        Ids of the source blocks and of the target blocks.
        """
        old = self.req_to_blocks[request_id]
        count = cdiv(keep, self.block_size)
        if in_place:
            # A block that is rewritten may not stay a prefix-cache entry.
            self.block_pool.evict_blocks({b.block_id for b in old if not self.block_pool.is_block_writable(b)})
            new, freed = old[:count], old[count:]
        else:
            new, freed = self.block_pool.get_new_blocks(count), old
        self.req_to_blocks[request_id] = list(new)
        self.num_cached_block[request_id] = 0
        self.evicted[request_id] = evicted
        self.block_pool.free_blocks(reversed(freed))
        return [b.block_id for b in old], [b.block_id for b in new]
