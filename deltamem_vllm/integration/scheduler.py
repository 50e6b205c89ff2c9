# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The scheduler: decides which requests are compacted, before vLLM schedules the step.

Blocks freed here are usable in the same step. The plan travels inside ``SchedulerOutput``, so workers hold no state
that can go stale: a request that is preempted, aborted or finished simply no longer appears in it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.integration import engine_rpc, request_view, spec
from deltamem_vllm.integration.levels import Levels
from deltamem_vllm.integration.manager import DeltaMemManager
from deltamem_vllm.integration.policy import Policy
from deltamem_vllm.memory.plans import StepPlan
from deltamem_vllm.telemetry import Telemetry

spec.register()


class DeltaMemSchedulerMixin:
    """Adds compaction to a vLLM scheduler; everything else is the base class's."""

    if TYPE_CHECKING:  # provided by vLLM's scheduler
        running: list[Request]
        waiting: Any
        max_num_running_reqs: int
        requests: dict[str, Request]
        kv_cache_manager: Any
        kv_cache_config: Any
        vllm_config: Any
        max_model_len: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        engine_rpc.install()
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or not isinstance(managers[0], DeltaMemManager):
            raise RuntimeError(
                "deltamem needs one KV cache group served by DeltaMemManager, found "
                f"{[type(m).__name__ for m in managers]}. This model is not supported: start it without "
                "--kv-cache-policy deltamem."
            )
        self.deltamem_manager: DeltaMemManager = managers[0]
        self.deltamem_config = DeltaMemConfig.from_additional_config(self.vllm_config.additional_config)
        self.deltamem = Telemetry()
        self.deltamem_policy = Policy(
            self.vllm_config, self.deltamem_config, self.deltamem_manager, self.deltamem, self.max_model_len
        )
        self._block_size: int = self.deltamem_manager.block_size
        group = self.kv_cache_config.kv_cache_groups[0]
        # Bytes of one token in every layer, on one tensor-parallel rank.
        self._token_bytes = len(group.layer_names) * group.kv_cache_spec.page_size_bytes / self._block_size
        self._levels = Levels(self.deltamem_manager, self.deltamem_policy.governed, self.deltamem, self._token_bytes)

    # ---- life of a request -------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            self.deltamem_policy.admit(request)
        super().add_request(request)  # type: ignore[misc]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.deltamem_policy.forget(request.request_id)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.deltamem_policy.preempted(request.request_id)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    # ---- one step ----------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        seats = self.max_num_running_reqs - len(self.running)
        began = time.perf_counter_ns()
        work = self.deltamem_policy.step(self.running, self.waiting, seats)
        self.deltamem.count("policy_ns", time.perf_counter_ns() - began)
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        manager = self.deltamem_manager
        # Requests preempted in this very step are gone from `evicted`. The others get the blocks just allocated, too.
        plans = tuple(
            replace(plan, blocks_after=tuple(b.block_id for b in manager.req_to_blocks[plan.request_id]))
            for plan in work.compactions
            if plan.request_id in manager.evicted
        )
        output.deltamem = StepPlan(  # type: ignore[attr-defined]
            compactions=plans,
            evicted=dict(manager.evicted),
            dealt=dict(manager.dealt),
            # The blocks of a request that was just preempted may be written by another one in this very step; they
            # are read before that, but the answer would be of no use.
            probes=tuple(probe for probe in work.probes if probe.request_id in manager.req_to_blocks),
        )
        return output

    # ---- numbers -----------------------------------------------------------------------------------------------

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        for metric, microseconds in getattr(model_runner_output, "deltamem_timings", {}).items():
            self.deltamem.count(metric, microseconds)
        self.deltamem_policy.answers(getattr(model_runner_output, "deltamem_curves", {}))
        self.deltamem_manager.take_cold(getattr(model_runner_output, "deltamem_cold", {}))
        return super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None:
            self._levels.measure(self.running)
            # The stats are msgspec-encoded: this str -> int field is the carrier, and our stat logger takes our keys
            # out again before vLLM's own loggers read it.
            stats.num_kv_fetch_reqs_by_stage.update(self.deltamem.drain())
        return stats

    def deltamem_stats(self) -> dict[str, Any]:
        """Cumulative counters, current levels and the last events, for ``GET /deltamem/stats``."""
        self._levels.measure(self.running, everything=True)
        running, waiting = self.get_request_counts()  # type: ignore[attr-defined]
        return {
            "active": True,
            "totals": self.deltamem.totals(),
            "pool": {
                "blocks": self.deltamem_policy.usable_blocks,
                "free_blocks": self.deltamem_manager.block_pool.get_num_free_blocks(),
                "block_tokens": self._block_size,
                "block_bytes": int(self._token_bytes * self._block_size),
            },
            "requests": {
                "running": running,
                "waiting": waiting,
                "compacted": len(self.deltamem_manager.evicted),
            },
            "recent": self.deltamem_policy.counts.events.newest_first(),
        }

    def deltamem_requests(self, limit: int) -> dict[str, Any]:
        """The live requests that hold most, for ``GET /deltamem/requests``."""
        governed = self.deltamem_policy.governed
        return request_view.rows(self.requests.values(), self.deltamem_manager, governed, self._token_bytes, limit)

    def deltamem_held(self, request_id: str) -> request_view.Held | str:
        """What a request holds, or why it holds nothing, for ``GET /deltamem/requests/{id}/layers``."""
        return request_view.held(request_id, self.requests, self.deltamem_manager)


class DeltaMemScheduler(DeltaMemSchedulerMixin, Scheduler):
    """vLLM's synchronous scheduler with compaction."""


class DeltaMemAsyncScheduler(DeltaMemSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with compaction; ``num_computed_tokens`` then counts tokens in flight, which is
    right because workers compact after them in stream order."""
