# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The same requests, all at once, on both engines in turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from deltamem_vllm.evaluation.bench.engine import Engine, Outputs, Result
from deltamem_vllm.evaluation.bench.kinds import ThroughputScenario
from deltamem_vllm.evaluation.bench.runs.session import (
    DELTAMEM,
    SIDES,
    STOCK,
    Progress,
    Session,
    both_policies,
    company,
    warm_up,
)
from deltamem_vllm.evaluation.bench.traffic import random_prompts
from deltamem_vllm.evaluation.machine import Moment

OUTPUTS = "outputs"
"""Key of the cells that say how far both sides said the same."""


def measure(session: Session, scenario: ThroughputScenario) -> None:
    """Measure the pairs that are missing."""
    missing = [
        repeat
        for repeat in range(scenario.repeats)
        if session.missing_pairs([(repeat,)]) or (scenario.compare_outputs and session.get(OUTPUTS, repeat) is None)
    ]
    session.say(f"{scenario.name}: {scenario.repeats - len(missing)} of {scenario.repeats} pairs are done")
    if not missing:
        return
    with session.engines(scenario, both_policies(scenario)) as engines:
        for engine in engines.values():
            warm_up(engine, scenario.traffic.prompt_tokens, scenario.traffic.output_tokens)
        progress = Progress(session.say, scenario.name, [1.0] * (2 * len(missing)))
        for repeat in missing:
            said: dict[str, list[Outputs]] = {}
            for side in SIDES:
                cell, said[side] = _round(scenario, repeat, engines, side)
                session.add(cell, side, repeat)
                progress.tell(
                    f"repeat {repeat + 1}, {side}: {cell['output_tokens_per_s']:.1f} output tokens/s, "
                    f"{cell['max_running']} running at most, {cell['preemptions']} preemptions, "
                    f"{cell['wall_s']:.0f} s, load {cell['load']:.1f}"
                )
            if scenario.compare_outputs:
                found = compare(said[STOCK], said[DELTAMEM])
                session.add(found, OUTPUTS, repeat)
                session.say(
                    f"{scenario.name}: repeat {repeat + 1}, {found['same_tokens']:.1%} of the requests said the same, "
                    f"log-probabilities differ by up to {found['logprob_difference']:.3g}"
                )


def _round(
    scenario: ThroughputScenario, repeat: int, engines: Mapping[str, Engine], side: str
) -> tuple[dict[str, Any], list[Outputs]]:
    """A side's cell, and what its requests said if that is compared."""
    engine = engines[side]
    others = [other for name, other in engines.items() if name != side]
    traffic = scenario.traffic
    prompts = random_prompts(
        traffic.requests,
        traffic.prompt_tokens,
        engine.facts["vocabulary"],
        f"{scenario.seed}/{scenario.name}/{repeat}",
    )
    bystanders_before = sum(other.cpu_seconds() for other in others)
    before = Moment.now()
    if scenario.compare_outputs:
        result = engine.run(prompts, traffic.output_tokens, outputs=True)
    else:
        result = engine.run(prompts, traffic.output_tokens)
    after = Moment.now()
    bystanders = sum(other.cpu_seconds() for other in others) - bystanders_before
    cell = {**round_cell(result), "bystander_cpu_s": bystanders, **company(before, after, result["cpu_s"])}
    return cell, [outputs for request in result["requests"] if (outputs := request.get("outputs")) is not None]


def compare(stock: Sequence[Outputs], ours: Sequence[Outputs]) -> dict[str, float]:
    """How far the same requests were answered alike.

    `same_tokens` is the share of requests with the same token ids. `logprob_difference` is the largest difference
    between the log-probabilities of a token that both said after the same tokens: up to the first that differs.
    """
    alike, largest, compared = 0, 0.0, 0
    for one, other in zip(stock, ours, strict=True):
        alike += one["token_ids"] == other["token_ids"]
        pairs = zip(one["token_ids"], other["token_ids"], one["logprobs"], other["logprobs"], strict=True)
        for token, same_token, logprob, other_logprob in pairs:
            if token != same_token:
                break
            compared += 1
            largest = max(largest, abs(logprob - other_logprob))
    return {"same_tokens": alike / len(stock), "logprob_difference": largest, "compared_tokens": compared}


def round_cell(result: Result) -> dict[str, Any]:
    """What is kept of a round: its totals, and medians over requests."""
    requests = result["requests"]
    tokens = sum(request["output_tokens"] for request in requests)
    totals: dict[str, Any] = {key: value for key, value in result.items() if key != "requests"}
    gaps = [r["rest_s"] / (r["output_tokens"] - 1) for r in requests if r["output_tokens"] > 1]
    return {
        **totals,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / result["wall_s"],
        "output_tokens_per_cpu_s": tokens / result["cpu_s"],
        "first_token_s": statistics.median(request["first_token_s"] for request in requests),
        "per_token_s": statistics.median(gaps) if gaps else None,
        "cached_tokens": sum(request["cached_tokens"] for request in requests),
    }
