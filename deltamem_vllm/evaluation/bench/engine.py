# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""An engine under measurement, seen from the bench: a child process that serves what it is told to.

Nothing here imports vLLM; the child is `deltamem_vllm.integration.bench_engine`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

from deltamem_vllm.evaluation.bench.scenario import Scenario

_CHILD = "deltamem_vllm.integration.bench_engine"
_LOG_LINES = 25


class RequestResult(TypedDict):
    """One served request. Seconds are from sending it; `rest_s` from its first token to its last."""

    first_token_s: float
    rest_s: float
    output_tokens: int
    cached_tokens: int


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


class EngineFailed(RuntimeError):
    """The engine's process ended or sent nonsense; the message has the end of its log."""


class Engine:
    """A running engine; a context manager that stops it.

    Parameters
    ----------
    engine_args : mapping
        Keyword arguments of vLLM's `AsyncEngineArgs`.
    stock : bool
        Whether no plugin may be loaded, ours least of all: vLLM as if deltamem were not installed.
    log : Path
        Where the engine's output goes.
    """

    def __init__(self, engine_args: Mapping[str, Any], log: Path, *, stock: bool) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        # The pool's size is given in blocks; a CPU's vLLM would still want most of the memory to be free.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "VLLM_NO_USAGE_STATS": "1"}
        if stock:
            # vLLM loads the plugins named here and no others; this names none.
            environment["VLLM_PLUGINS"] = ""
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", _CHILD],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        try:
            self.facts: dict[str, Any] = self._ask({"engine_args": dict(engine_args)}, "ready")
        except BaseException:
            self.close()
            raise

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
    ) -> Result:
        """Serve prompts, each with exactly `output_tokens` tokens of output.

        Parameters
        ----------
        options : mapping, optional
            What a client would put into `vllm_xargs`.
        one_by_one : bool
            Whether each request waits for the one before; otherwise all are sent at once.
        """
        command = {
            "prompts": prompts,
            "output_tokens": output_tokens,
            "options": dict(options or {}),
            "one_by_one": one_by_one,
        }
        result: Result = self._ask(command, "result")
        served = [request["output_tokens"] for request in result["requests"]]
        if served != [output_tokens] * len(prompts):
            raise EngineFailed(f"asked for {output_tokens} tokens for each of {len(prompts)} prompts, got {served}")
        return result

    def cpu_seconds(self) -> float:
        """CPU time that the engine's processes have used so far."""
        return float(self._ask({}, "cpu_s"))

    def close(self) -> None:
        """Stop the engine; its own children end with it."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            # A process that is gone already is collected below.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, command: Mapping[str, Any], wanted: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None, "opened with pipes"
        try:
            self._process.stdin.write((json.dumps(command) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        answer = json.loads(line)
        if wanted not in answer:
            raise EngineFailed(f"expected {wanted!r} from the engine, got {sorted(answer)}")
        return answer[wanted]

    def _failed(self) -> EngineFailed:
        status = self._process.wait(timeout=60)
        lines = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        tail = "\n".join(f"    {line}" for line in lines)
        return EngineFailed(f"the engine ended with status {status}. The end of {self._log}:\n{tail}")


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
    if policy is not None:
        arguments["additional_config"] = {"deltamem": dict(policy)}
    return arguments
