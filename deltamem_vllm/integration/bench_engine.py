# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""One vLLM engine at the end of two pipes: the process that `deltamem bench` starts for each side.

It is vLLM's asynchronous frontend with the engine core in a process of its own, as in a server, without
HTTP. One JSON object a line comes in on stdin and goes out on the stdout it was born with:

    in   {"engine_args": {...}}                            first line
    out  {"ready": {...}}
    in   {"prompts": [[...]], "output_tokens": n, "options": {...}, "one_by_one": false}
    out  {"result": {...}}, fields as in evaluation.bench.engine.Result
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped]  # a dependency of vLLM
import torch
from vllm import SamplingParams
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from deltamem_vllm.config import CONFIG_KEY
from deltamem_vllm.telemetry import CARRIER_PREFIX, decode

# The stats of the last step arrive with its tokens; this only bounds the wait if they never do.
_SETTLE_S = 10.0


@dataclass
class Steps:
    """What the scheduler said after each step."""

    running: list[int] = field(default_factory=list)
    unfinished: int = 0
    preemptions: int = 0
    peak_pool_usage: float = 0.0
    policy: Counter[str] = field(default_factory=Counter)


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
        waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
        steps.unfinished = scheduler_stats.num_running_reqs + waiting
        steps.running.append(scheduler_stats.num_running_reqs)
        steps.peak_pool_usage = max(steps.peak_pool_usage, scheduler_stats.kv_cache_usage)
        for name, amount in scheduler_stats.num_kv_fetch_reqs_by_stage.items():
            found = decode(name)
            if found is not None and found[0].kind == "counter":
                steps.policy[name.removeprefix(CARRIER_PREFIX)] += amount

    def log_engine_initialized(self) -> None:
        """Nothing to say: the parent process reports."""


class Engine:
    """An engine and its recorder."""

    def __init__(self, engine_args: dict[str, Any]) -> None:
        began = time.perf_counter()
        self._recorders: list[Recorder] = []
        arguments = AsyncEngineArgs(**engine_args, enable_log_requests=False, disable_log_stats=True)
        self._llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._recorder])
        self._process = psutil.Process()
        self._count = 0
        config = self._llm.vllm_config
        self.facts = {
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
            "policy": _policy(config),
            "start_s": time.perf_counter() - began,
        }

    def _recorder(self, vllm_config: VllmConfig, engine_index: int = 0) -> Recorder:
        self._recorders.append(Recorder(vllm_config, engine_index))
        return self._recorders[-1]

    async def run(
        self, prompts: list[list[int]], output_tokens: int, options: dict[str, Any], one_by_one: bool
    ) -> dict[str, Any]:
        """Serve the prompts and say what happened; see `evaluation.bench.engine.Result`."""
        (recorder,) = self._recorders
        recorder.steps = Steps()
        params = SamplingParams(
            temperature=0.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=options or None,
        )
        cpu_began, began = self.cpu_seconds(), time.perf_counter()
        if one_by_one:
            requests = [await self._serve(prompt, params) for prompt in prompts]
        else:
            requests = await asyncio.gather(*(self._serve(prompt, params) for prompt in prompts))
        wall = time.perf_counter() - began
        cpu = self.cpu_seconds() - cpu_began
        deadline = time.perf_counter() + _SETTLE_S
        while recorder.steps.unfinished:
            if time.perf_counter() > deadline:
                raise RuntimeError(f"the engine still counts {recorder.steps.unfinished} requests as unfinished")
            await asyncio.sleep(0.005)
        steps = recorder.steps
        return {
            "wall_s": wall,
            "cpu_s": cpu,
            "requests": requests,
            "steps": len(steps.running),
            "max_running": max(steps.running),
            "mean_running": sum(steps.running) / len(steps.running),
            "preemptions": steps.preemptions,
            "peak_pool_usage": steps.peak_pool_usage,
            "policy": dict(steps.policy),
        }

    async def _serve(self, prompt: list[int], params: SamplingParams) -> dict[str, Any]:
        self._count += 1
        sent = time.perf_counter()
        arrivals: list[float] = []
        tokens = cached = 0
        stream = self._llm.generate(TokensPrompt(prompt_token_ids=prompt), params, str(self._count))
        async for output in stream:
            arrivals.append(time.perf_counter() - sent)
            tokens += len(output.outputs[0].token_ids)
            cached = output.num_cached_tokens or 0
        return {
            "first_token_s": arrivals[0],
            # A request of two tokens: how long the second one took is the stall of a compaction.
            "rest_s": arrivals[-1] - arrivals[0],
            "output_tokens": tokens,
            "cached_tokens": cached,
        }

    def cpu_seconds(self) -> float:
        """CPU time of this process and of all engine processes below it."""
        times = [p.cpu_times() for p in (self._process, *self._process.children(recursive=True))]
        return float(sum(t.user + t.system for t in times))

    def close(self) -> None:
        self._llm.shutdown()


def _policy(config: VllmConfig) -> dict[str, Any] | None:
    additional = config.additional_config
    return additional.get(CONFIG_KEY) if isinstance(additional, dict) else None


async def main(answers: int) -> None:
    """Serve the parent process until it closes the pipe."""
    loop = asyncio.get_running_loop()

    async def read() -> Any:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        return json.loads(line) if line else None

    def answer(what: str, value: Any) -> None:
        os.write(answers, (json.dumps({what: value}) + "\n").encode())

    first = await read()
    engine = Engine(first["engine_args"])
    try:
        answer("ready", engine.facts)
        while (command := await read()) is not None:
            if "prompts" in command:
                answer("result", await engine.run(**command))
            else:
                answer("cpu_s", engine.cpu_seconds())
    finally:
        engine.close()


if __name__ == "__main__":
    # vLLM and its children may print; only answers belong on the pipe. Children do not inherit it.
    pipe = os.dup(1)
    os.dup2(2, 1)
    asyncio.run(main(pipe))
