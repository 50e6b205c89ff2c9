# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""One vLLM engine at the end of two pipes: the process that `deltamem bench` starts for each side.

It is vLLM's asynchronous frontend with the engine core in a process of its own, as in a server, without
HTTP. One JSON object a line comes in on stdin and goes out on the stdout it was born with:

    in   {"engine_args": {...}, "stepwise": false}         first line
    out  {"ready": {...}}
    in   {"prompts": [[...]], "output_tokens": n, "options": {...}, "one_by_one": false,
          "outputs": false}
    out  {"result": {...}}, fields as in evaluation.bench.engine.Result
    in   {}
    out  {"cpu_s": seconds}

A stepwise one is `bench_ramp.RampEngine` and adds requests one by one instead:

    in   {"prompts": [[...]], "output_tokens": n}
    out  {"ramp": {...}}, fields as in evaluation.bench.engine.Ramp
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from deltamem_vllm.integration.bench_ramp import RampEngine
from deltamem_vllm.integration.bench_stats import Recorder, Steps, cpu_seconds, engine_facts
from deltamem_vllm.integration.parent_pipe import ParentPipe

# The stats of the last step arrive with its tokens; this only bounds the wait if they never do.
_SETTLE_S = 10.0
# From the frontend's books to its socket. The order of what goes through that is kept.
_HANDED_OVER_S = 0.05


class Engine:
    """An engine and its recorder."""

    def __init__(self, engine_args: dict[str, Any]) -> None:
        began = time.perf_counter()
        self._recorders: list[Recorder] = []
        arguments = AsyncEngineArgs(**engine_args, enable_log_requests=False, disable_log_stats=True)
        self._llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[self._recorder])
        self._count = 0
        self.facts = engine_facts(self._llm.vllm_config, time.perf_counter() - began)

    def _recorder(self, vllm_config: VllmConfig, engine_index: int = 0) -> Recorder:
        self._recorders.append(Recorder(vllm_config, engine_index))
        return self._recorders[-1]

    async def run(
        self, prompts: list[list[int]], output_tokens: int, options: dict[str, Any], one_by_one: bool, outputs: bool
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
            logprobs=0 if outputs else None,  # those of the chosen tokens alone
        )
        held = outputs and not one_by_one
        if held:
            await self._llm.pause_generation(mode="keep", clear_cache=False)
        cpu_began, began = cpu_seconds(), time.perf_counter()
        if one_by_one:
            requests = [await self._serve(prompt, params, began) for prompt in prompts]
        else:
            serving = asyncio.gather(*(self._serve(prompt, params, began) for prompt in prompts))
            if held:
                await self._resume_with(len(prompts))
            requests = await serving
        wall = time.perf_counter() - began
        cpu = cpu_seconds() - cpu_began
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

    async def _resume_with(self, count: int) -> None:
        """Let a paused engine go on once so many requests have been handed to it."""
        while len(self._llm.output_processor.request_states) < count:
            await asyncio.sleep(0.005)
        await asyncio.sleep(_HANDED_OVER_S)
        await self._llm.resume_generation()

    async def _serve(self, prompt: list[int], params: SamplingParams, began: float) -> dict[str, Any]:
        self._count += 1
        sent = time.perf_counter()
        arrivals: list[tuple[float, int]] = []
        tokens = cached = 0
        said: dict[str, list[Any]] = {"token_ids": [], "logprobs": []}
        stream = self._llm.generate(TokensPrompt(prompt_token_ids=prompt), params, str(self._count))
        async for output in stream:
            tokens += len(output.outputs[0].token_ids)
            arrivals.append((time.perf_counter() - began, tokens))
            cached = output.num_cached_tokens or 0
            newest = output.outputs[0]
            if newest.logprobs is not None:
                said["token_ids"] += newest.token_ids
                for at, token in zip(newest.logprobs, newest.token_ids, strict=True):
                    assert at is not None, "asked for"
                    said["logprobs"].append(at[token].logprob)
        return {
            "first_token_s": arrivals[0][0] - (sent - began),
            # A request of two tokens: how long the second one took is the stall of a compaction.
            "rest_s": arrivals[-1][0] - arrivals[0][0],
            "arrivals": arrivals,
            "output_tokens": tokens,
            "cached_tokens": cached,
            "outputs": said if params.logprobs is not None else None,
        }

    def close(self) -> None:
        self._llm.shutdown()


async def main(pipe: ParentPipe) -> None:
    """Serve the parent process until it closes the pipe."""
    loop = asyncio.get_running_loop()
    first = await loop.run_in_executor(None, pipe.read)
    engine = RampEngine(first["engine_args"]) if first["stepwise"] else Engine(first["engine_args"])
    try:
        pipe.answer("ready", engine.facts)
        while (command := await loop.run_in_executor(None, pipe.read)) is not None:
            if "prompts" not in command:
                pipe.answer("cpu_s", cpu_seconds())
            elif isinstance(engine, RampEngine):
                pipe.answer("ramp", engine.ramp(**command))
            else:
                pipe.answer("result", await engine.run(**command))
    finally:
        engine.close()


if __name__ == "__main__":
    asyncio.run(main(ParentPipe()))
