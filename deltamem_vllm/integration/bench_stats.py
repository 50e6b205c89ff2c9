# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What an engine under measurement says about itself: the stats of its steps, its settings, its CPU time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # a dependency of vLLM
import torch
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from deltamem_vllm.config import CONFIG_KEY
from deltamem_vllm.telemetry import CARRIER_PREFIX, decode


@dataclass
class Steps:
    """What the scheduler said after each step. `waiting` and `pool_usage` are of the last one."""

    running: list[int] = field(default_factory=list)
    waiting: int = 0
    pool_usage: float = 0.0
    peak_pool_usage: float = 0.0
    preemptions: int = 0
    policy: Counter[str] = field(default_factory=Counter)

    @property
    def unfinished(self) -> int:
        """Requests that ran or waited in the last step."""
        return self.waiting + (self.running[-1] if self.running else 0)


class Recorder(StatLoggerBase):
    """Keeps the stats of every step. vLLM calls it before our own logger takes the policy's numbers out."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.steps = Steps()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        steps = self.steps
        if iteration_stats is not None:
            steps.preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is None:
            return
        steps.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        steps.running.append(scheduler_stats.num_running_reqs)
        steps.pool_usage = scheduler_stats.kv_cache_usage
        steps.peak_pool_usage = max(steps.peak_pool_usage, steps.pool_usage)
        for name, amount in scheduler_stats.num_kv_fetch_reqs_by_stage.items():
            found = decode(name)
            if found is not None and found[0].kind == "counter":
                steps.policy[name.removeprefix(CARRIER_PREFIX)] += amount

    def log_engine_initialized(self) -> None:
        """Nothing to say: the parent process reports."""


def engine_facts(config: VllmConfig, start_s: float) -> dict[str, Any]:
    """Versions and the settings that decide how fast an engine is and how much it holds."""
    additional = config.additional_config
    policy = additional.get(CONFIG_KEY) if isinstance(additional, dict) else None
    if policy is not None and "calibration" in policy:
        # Found ones are named by their place on this machine, which is nobody's business in a report.
        policy = {**policy, "calibration": Path(policy["calibration"]).name}
    return {
        "vllm": vllm_version,
        "torch": torch.__version__,
        "device": config.device_config.device_type,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "vocabulary": config.model_config.get_vocab_size(),
        "block_size": config.cache_config.block_size,
        "pool_blocks": config.cache_config.num_gpu_blocks,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "compilation": config.compilation_config.mode.name,
        "policy": policy,
        "start_s": start_s,
    }


def cpu_seconds() -> float:
    """CPU time of this process and of all engine processes below it."""
    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))
