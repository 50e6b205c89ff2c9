# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Two real servers, stock vLLM's and deltamem's, in turns under the traffic of vLLM's own client."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_vllm.evaluation.bench.client import ClientFailed, client_cell, client_command, run_client
from deltamem_vllm.evaluation.bench.engine import engine_args
from deltamem_vllm.evaluation.bench.kinds import ConversationScenario, ServingScenario
from deltamem_vllm.evaluation.bench.runs.session import SIDES, Progress, Say, Session, both_policies
from deltamem_vllm.evaluation.bench.traffic import random_prompts
from deltamem_vllm.evaluation.live_server import MODEL_NAME, LiveServer, ServerFailed, serve
from deltamem_vllm.evaluation.machine import Moment

__all__ = ["ClientFailed", "ServerFailed", "measure"]

# Seconds the client may take: to start, and per token of the traffic on a slow machine.
_CLIENT_START_S = 300.0
_PER_TOKEN_S = 0.1
_VALUE_FLAGS = (
    *("dtype", "max_model_len", "block_size", "max_num_seqs", "max_num_batched_tokens", "seed"),
    *("num_gpu_blocks_override", "gpu_memory_utilization"),
)
# Every tokenizer has so many tokens.
_ANY_VOCABULARY = 256


def measure(session: Session, scenario: ServingScenario) -> None:
    """Measure the pairs that are missing."""
    missing = [repeat for repeat in range(scenario.repeats) if session.missing_pairs([(repeat,)])]
    session.say(f"{scenario.name}: {scenario.repeats - len(missing)} of {scenario.repeats} pairs are done")
    if not missing:
        return
    # Both change the folder they start processes in.
    model = str(Path(session.model).resolve()) if Path(session.model).is_dir() else session.model
    logs = session.logs.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    with _servers(session, scenario, model, logs) as servers:
        for server in servers.values():
            _warm_up(server, scenario)
        progress = Progress(session.say, scenario.name, [1.0] * (2 * len(missing)))
        for repeat in missing:
            for side in SIDES:
                cell = _round(scenario, servers[side], model, logs, side, repeat)
                session.add(cell, side, repeat)
                progress.tell(
                    f"repeat {repeat + 1}, {side}: {cell['output_throughput']:.1f} output tokens/s, "
                    f"TTFT {cell['median_ttft_ms'] / 1e3:.2f} s, TPOT {cell['median_tpot_ms']:.0f} ms, "
                    f"load {cell['load']:.1f}"
                )


@contextmanager
def _servers(session: Session, scenario: ServingScenario, model: str, logs: Path) -> Iterator[dict[str, LiveServer]]:
    """Both servers, started at the same time."""
    session.say(f"{scenario.name}: starting two servers")
    flags = server_flags(scenario)
    policies = both_policies(scenario)
    with ExitStack() as stack:
        # Left only when both have started or failed: those that run are then stopped, whatever happened here.
        with ThreadPoolExecutor(len(policies)) as threads:
            starting = {
                side: threads.submit(
                    stack.enter_context,
                    serve(
                        model,
                        logs / f"{scenario.name}-{side}.log",
                        deltamem=policy,
                        flags=flags,
                        report=_Prefixed(session.say, f"{scenario.name}: {side}: "),
                        # vLLM as if deltamem were not installed.
                        environment={"VLLM_PLUGINS": ""} if policy is None else None,
                    ),
                )
                for side, policy in policies.items()
            }
        servers = {side: future.result() for side, future in starting.items()}
        for side, server in servers.items():
            session.add({"flags": " ".join(flags), "policy": policies[side]}, "engine", side)
            session.say(f"{scenario.name}: {side} answers at {server.url}")
        yield servers


@dataclass(frozen=True)
class _Prefixed:
    say: Say
    prefix: str

    def __call__(self, line: str) -> None:
        self.say(self.prefix + line)


def server_flags(scenario: ServingScenario | ConversationScenario) -> list[str]:
    """Flags of `vllm serve` for what a scenario says of its engine."""
    arguments = engine_args(scenario, "", None)
    flags = []
    for name in _VALUE_FLAGS:
        if name in arguments:
            flags += [f"--{name.replace('_', '-')}", str(arguments[name])]
    flags.append("--enable-prefix-caching" if arguments["enable_prefix_caching"] else "--no-enable-prefix-caching")
    if arguments["enforce_eager"]:
        flags.append("--enforce-eager")
    return flags


def _warm_up(server: LiveServer, scenario: ServingScenario) -> None:
    """Send requests of the scenario's length, whose prompts are in no traffic."""
    for prompt in random_prompts(2, scenario.traffic.prompt_tokens, _ANY_VOCABULARY, "warm-up"):
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 2, "temperature": 0}
        request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_CLIENT_START_S) as answer:
            answer.read()


def _round(
    scenario: ServingScenario, server: LiveServer, model: str, logs: Path, side: str, repeat: int
) -> dict[str, Any]:
    """One call of the client."""
    report = logs / f"{scenario.name}-{side}-client.json"
    # Its own seed for each repeat: prompts that come again would be answered from the prefix cache.
    command = client_command(scenario, server.url, MODEL_NAME, model, scenario.seed + repeat, report)
    tokens = scenario.traffic.requests * scenario.traffic.tokens
    arriving_s = 0.0 if scenario.request_rate is None else scenario.traffic.requests / scenario.request_rate
    counted = server_counters(server.get("/metrics"))
    before = Moment.now()
    found = run_client(
        command, report, report.with_suffix(".log"), _CLIENT_START_S + 2 * arriving_s + tokens * _PER_TOKEN_S
    )
    after = Moment.now()
    grown = server_counters(server.get("/metrics"))
    return {
        **client_cell(found, scenario.traffic.requests),
        **{name: grown.get(name, 0.0) - counted.get(name, 0.0) for name in COUNTERS.values()},
        "load_before": before.load,
        "load": after.load,
    }


COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "deltamem_compactions_total": "compactions",
    "deltamem_evicted_tokens_total": "evicted_tokens",
}
"""Samples of the servers' `/metrics` that cells keep the growth of, and their names there."""


def server_counters(metrics: str) -> dict[str, float]:
    """Sum the samples of `COUNTERS` over engines; a stock server has no `deltamem_*`."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in COUNTERS:
                name = COUNTERS[sample.name]
                found[name] = found.get(name, 0.0) + sample.value
    return found
