# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The section of an unbounded scenario."""

from __future__ import annotations

from deltamem_vllm.evaluation.bench.kinds import UnboundedScenario
from deltamem_vllm.evaluation.bench.report.tables import View, repeats_done, shown, table
from deltamem_vllm.evaluation.bench.runs.session import STOCK
from deltamem_vllm.evaluation.bench.runs.unbounded import key


def measured(view: View, scenario: UnboundedScenario, measure: str) -> dict[str, list[float]]:
    """What a target is judged by: the longest request for `pools`, else the largest value of each repeat."""
    if measure == "pools":
        longest = max(scenario.requests, key=lambda request: request.tokens)
        return {f"{longest.tokens} tokens served, in pools": view.values("pools", *key(longest))}
    requests = [view.values(measure, *key(request)) for request in scenario.requests]
    return {f"{measure}, largest": [max(values) for values in zip(*requests, strict=False)]}


def section(view: View, scenario: UnboundedScenario) -> list[str]:
    """What was done, and table."""
    blocks, block_size = scenario.pool_blocks - 1, scenario.engine.block_size
    lines = [
        f"One request at a time, random prompts, exact output lengths. The KV pool has {blocks} blocks of {block_size}",
        f"tokens, {blocks * block_size} tokens in all. Blocks are those in use after a step, at most; pools are the",
        "tokens of the request over those of the pool.",
        "",
    ]
    rows = []
    for request in scenario.requests:
        cells = view.repeats(*key(request))
        rows.append(
            [
                str(request.prompt_tokens),
                str(request.output_tokens),
                shown([cell["pools"] for cell in cells], ".1f"),
                shown([cell["peak_blocks"] for cell in cells], ".0f"),
                shown([cell["first_token_s"] for cell in cells], ".2f"),
                shown([cell["per_token_s"] * 1e3 for cell in cells if cell["per_token_s"] is not None], ".1f"),
                shown([cell["compactions"] for cell in cells], ".0f"),
                shown([cell["evicted_tokens"] for cell in cells], ".0f"),
                shown([cell["preemptions"] for cell in cells], ".0f"),
                shown([cell["load"] for cell in cells], ".1f"),
                repeats_done(view, *key(request)),
            ]
        )
    header = ("prompt tokens", "output tokens", "pools", "blocks, most", "TTFT, s", "TPOT, ms")
    lines += table((*header, "compactions", "evicted tokens", "preemptions", "load", "repeats"), rows)
    stock = view.get(STOCK)
    if stock is None:
        return lines
    if stock["starts"]:
        return [*lines, "Stock vLLM starts with this pool and this longest request; it was not asked to serve it.", ""]
    return [*lines, f"Stock vLLM does not start with this pool and this longest request: `{stock['says']}`", ""]
