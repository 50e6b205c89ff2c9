# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Requests longer than the whole pool, one at a time; and what stock vLLM says when it is started like that."""

from __future__ import annotations

import re
from typing import Any

from deltamem_vllm.evaluation.bench.engine import Engine
from deltamem_vllm.evaluation.bench.kinds import Length, UnboundedScenario
from deltamem_vllm.evaluation.bench.runs.session import (
    DELTAMEM,
    STOCK,
    Progress,
    Session,
    both_policies,
    company,
    warm_up,
)
from deltamem_vllm.evaluation.bench.traffic import random_prompts
from deltamem_vllm.evaluation.child import ChildFailed
from deltamem_vllm.evaluation.machine import Moment


def measure(session: Session, scenario: UnboundedScenario) -> None:
    """Start stock vLLM once, then measure the requests that are missing."""
    if session.get(STOCK) is None:
        session.add(_stock(session, scenario), STOCK)
    missing = [
        (request, repeat)
        for repeat in range(scenario.repeats)
        for request in scenario.requests
        if session.get(*key(request), repeat) is None
    ]
    session.say(f"{scenario.name}: {len(missing)} requests to serve")
    if not missing:
        return
    with session.engines(scenario, {DELTAMEM: both_policies(scenario)[DELTAMEM]}) as engines:
        engine = engines[DELTAMEM]
        shortest = min(scenario.requests, key=lambda request: request.tokens)
        warm_up(engine, shortest.prompt_tokens, shortest.output_tokens)
        progress = Progress(session.say, scenario.name, [float(request.tokens) for request, _ in missing])
        for request, repeat in missing:
            cell = _serve(scenario, engine, request, repeat)
            session.add(cell, *key(request), repeat)
            progress.tell(
                f"repeat {repeat + 1}, {request.prompt_tokens} + {request.output_tokens} tokens in "
                f"{cell['wall_s']:.1f} s, at most {cell['peak_blocks']:.0f} of {scenario.pool_blocks - 1} blocks, "
                f"load {cell['load']:.1f}"
            )


def key(request: Length) -> tuple[str | int, ...]:
    """Of the request's cells, up to the repeat."""
    return DELTAMEM, request.prompt_tokens, request.output_tokens


def _serve(scenario: UnboundedScenario, engine: Engine, request: Length, repeat: int) -> dict[str, Any]:
    seed = f"{scenario.seed}/{scenario.name}/{request.prompt_tokens}/{request.output_tokens}/{repeat}"
    prompts = random_prompts(1, request.prompt_tokens, engine.facts["vocabulary"], seed)
    before = Moment.now()
    result = engine.run(prompts, request.output_tokens)
    after = Moment.now()
    (served,) = result["requests"]
    more = request.output_tokens - 1
    return {
        "wall_s": result["wall_s"],
        "first_token_s": served["first_token_s"],
        "per_token_s": served["rest_s"] / more if more else None,
        "pools": request.tokens / ((scenario.pool_blocks - 1) * scenario.engine.block_size),
        "peak_pool_usage": result["peak_pool_usage"],
        "peak_blocks": result["peak_pool_usage"] * (scenario.pool_blocks - 1),
        "preemptions": result["preemptions"],
        "compactions": result["policy"].get("compactions", 0),
        "evicted_tokens": result["policy"].get("evicted_tokens", 0),
        **company(before, after, result["cpu_s"]),
    }


def _stock(session: Session, scenario: UnboundedScenario) -> dict[str, Any]:
    """Whether stock vLLM starts with such a pool, and if not, what it says."""
    try:
        with session.engines(scenario, {STOCK: None}):
            return {"starts": True, "says": ""}
    except ChildFailed:
        # The parent of the process that refused only says that it did; the reason stands further up.
        log = (session.logs / f"{scenario.name}-{STOCK}.log").read_text(encoding="utf-8", errors="replace")
        said = re.findall(r"ValueError: (.+)", log)
        if not said:
            raise
        session.say(f"{scenario.name}: stock does not start: {said[0]}")
        return {"starts": False, "says": said[0].strip()}
