# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""An engine under measurement, seen from the bench: a child process that serves what it is told to.

Nothing here imports vLLM; the child is `deltamem_vllm.integration.bench_engine`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from deltamem_vllm.evaluation.bench.kinds import Scenario
from deltamem_vllm.evaluation.bench.ramp import Ending, Step
from deltamem_vllm.evaluation.child import Child, ChildFailed

_CHILD = "deltamem_vllm.integration.bench_engine"


class Outputs(TypedDict):
    """What a request said: token ids and the log-probability of each."""

    token_ids: list[int]
    logprobs: list[float]


class RequestResult(TypedDict):
    """One served request.

    `first_token_s` is from sending it, `rest_s` from its first token to its last. `arrivals` are moments at
    which output came, in seconds since the round began, each with the tokens that were there by then.
    """

    first_token_s: float
    rest_s: float
    arrivals: list[tuple[float, int]]
    output_tokens: int
    cached_tokens: int
    outputs: Outputs | None


class Result(TypedDict):
    """What one round of requests did. `policy` holds telemetry keys and how much they grew."""

    wall_s: float
    cpu_s: float
    requests: list[RequestResult]
    steps: int
    max_running: int
    mean_running: float
    preemptions: int
    peak_pool_usage: float
    policy: dict[str, int]


class Ramp(TypedDict):
    """Requests added one by one until `ended_by` happened. `policy` as in `Result`."""

    ended_by: Ending
    steps: list[Step]
    wall_s: float
    cpu_s: float
    policy: dict[str, int]


class Engine:
    """An engine that is starting or running; a context manager that stops it. Call `ready` first.

    Parameters
    ----------
    engine_args : mapping
        Keyword arguments of vLLM's `AsyncEngineArgs`.
    stock : bool
        Whether no plugin may be loaded, ours least of all: vLLM as if deltamem were not installed.
    log : Path
        Where the engine's output goes.
    stepwise : bool
        Whether it serves `ramp` instead of `run`; frontend and scheduler are then one process.
    """

    facts: dict[str, Any]
    """What the engine says of itself once it is ready."""

    def __init__(self, engine_args: Mapping[str, Any], log: Path, *, stock: bool, stepwise: bool = False) -> None:
        # The pool's size is given in blocks; a CPU's vLLM would still want most of the memory to be free.
        environment = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
        environment["VLLM_NO_USAGE_STATS"] = "1"
        if stock:
            # vLLM loads the plugins named here and no others; this names none.
            environment["VLLM_PLUGINS"] = ""
        if stepwise:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            # In one process vLLM pins its threads to one core, where more of them only get in each other's way.
            environment["OMP_NUM_THREADS"] = "1"
        self._child = Child(_CHILD, log, environment)
        try:
            self._child.send({"engine_args": dict(engine_args), "stepwise": stepwise})
        except BaseException:
            self.close()
            raise

    def ready(self) -> Engine:
        """Wait until it has started. Engines whose constructors were called before start meanwhile."""
        self.facts = self._child.receive("ready")
        return self

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self,
        prompts: list[list[int]],
        output_tokens: int,
        *,
        options: Mapping[str, Any] | None = None,
        one_by_one: bool = False,
        outputs: bool = False,
    ) -> Result:
        """Serve prompts, each with exactly `output_tokens` tokens of output.

        Parameters
        ----------
        options : mapping, optional
            What a client would put into `vllm_xargs`.
        one_by_one : bool
            Whether each request waits for the one before; otherwise all are sent at once.
        outputs : bool
            Whether to return what was said. Requests sent at once are then held back until all are in the queue, so
            that steps do not depend on how fast they arrive: the same batches, the same rounding.
        """
        command = {
            "prompts": prompts,
            "output_tokens": output_tokens,
            "options": dict(options or {}),
            "one_by_one": one_by_one,
            "outputs": outputs,
        }
        result: Result = self._child.ask(command, "result")
        served = [request["output_tokens"] for request in result["requests"]]
        if served != [output_tokens] * len(prompts):
            raise ChildFailed(f"asked for {output_tokens} tokens for each of {len(prompts)} prompts, got {served}")
        return result

    def ramp(self, prompts: list[list[int]], output_tokens: int) -> Ramp:
        """Add the prompts one by one, each once all before it decode, until the engine is full; then drop all.

        Only on a stepwise engine. `output_tokens` is what each may produce; it should not get that far.
        """
        ramp: Ramp = self._child.ask({"prompts": prompts, "output_tokens": output_tokens}, "ramp")
        return ramp

    def cpu_seconds(self) -> float:
        """CPU time that the engine's processes have used so far."""
        return float(self._child.ask({}, "cpu_s"))

    def close(self) -> None:
        """Stop the engine; its own children end with it."""
        self._child.close()


def engine_args(scenario: Scenario, model: str, policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """vLLM's engine arguments for a scenario; without `policy`, those of stock vLLM."""
    settings = scenario.engine
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "max_model_len": scenario.max_model_len,
        "block_size": settings.block_size,
        "enable_prefix_caching": settings.prefix_caching,
        "enforce_eager": not settings.compiled,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "num_gpu_blocks_override": scenario.pool_blocks,
        "seed": scenario.seed,
    }
    if settings.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if policy is not None:
        arguments["additional_config"] = {"deltamem": dict(policy)}
    return arguments
