# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The section of a throughput scenario."""

from __future__ import annotations

from deltamem_vllm.evaluation.bench.kinds import ThroughputScenario
from deltamem_vllm.evaluation.bench.report.tables import View, compared, repeats_done, shown, table
from deltamem_vllm.evaluation.bench.runs.session import DELTAMEM
from deltamem_vllm.evaluation.bench.runs.throughput import OUTPUTS

# Title, field, format, and whether the ratio says something: that of preemptions may divide by zero and that of
# the load means nothing.
_ROWS: tuple[tuple[str, str, str, bool], ...] = (
    ("output tokens/s", "output_tokens_per_s", ".1f", True),
    ("output tokens per CPU second", "output_tokens_per_cpu_s", ".1f", True),
    ("running at once, most", "max_running", ".0f", True),
    ("running at once, mean over steps", "mean_running", ".1f", True),
    ("preemptions", "preemptions", ".0f", False),
    ("engine steps", "steps", ".0f", False),
    ("time to first token, median request, s", "first_token_s", ".2f", True),
    ("time per further token, median request, s", "per_token_s", ".3f", True),
    ("whole round, s", "wall_s", ".1f", True),
    ("CPU of the engine, s", "cpu_s", ".1f", True),
    ("CPU of the waiting engine, s", "bystander_cpu_s", ".2f", False),
    ("cores busy with other work", "others_cores", ".2f", False),
    ("load average at the end", "load", ".1f", False),
)
_POLICY_ROWS = (
    ("compactions", 1.0, ".0f", "compactions"),
    ("evicted_tokens", 1.0, ".0f", "evicted tokens"),
    ("compaction_us", 1e-6, ".2f", "compaction time, s"),
    ("pressure_blocks", 1.0, ".0f", "blocks taken under pressure"),
    ("probes", 1.0, ".0f", "looks at what a request's blocks are worth"),
    ("skipped:no_free_blocks", 1.0, ".0f", "compactions skipped: no free blocks"),
    ("skipped:shared_prefix", 1.0, ".0f", "compactions skipped: shared prefix"),
)


def measured(view: View, scenario: ThroughputScenario, measure: str) -> dict[str, list[float]]:
    """What a target is judged by."""
    if measure in scenario.counts:
        return {
            f"{measure} of deltamem": [
                float(cell["policy"].get(measure, 0) if measure == "compactions" else cell[measure])
                for cell in view.repeats(DELTAMEM)
            ]
        }
    if measure in scenario.outputs:
        return {measure: view.values(measure, OUTPUTS)}
    return {f"{measure}, ratio": view.ratios(measure)}


def section(view: View, scenario: ThroughputScenario) -> list[str]:
    """Traffic and table."""
    traffic, blocks = scenario.traffic, scenario.pool_blocks - 1
    lines = [
        f"{traffic.requests} requests of {traffic.prompt_tokens} random prompt tokens and exactly",
        f"{traffic.output_tokens} output tokens, all sent at once, each prompt different. The KV pool has",
        f"{blocks} blocks of {scenario.engine.block_size} tokens: {scenario.pool_requests} whole requests.",
        "",
    ]
    rows = []
    for title, field, form, has_ratio in _ROWS:
        stock, ours, ratio = compared(view, field, form)
        rows.append([title, stock, ours, ratio if has_ratio else ""])
    for key, scale, form, title in _POLICY_ROWS:
        counts = [cell["policy"].get(key, 0) * scale for cell in view.repeats(DELTAMEM)]
        rows.append([title, "", shown(counts, form), ""])
    lines += table((f"median of {repeats_done(view)}", "stock", "deltamem", "ratio"), rows)
    if scenario.compare_outputs:
        lines += _same_outputs(view)
    return lines


def _same_outputs(view: View) -> list[str]:
    """How far both sides said the same."""
    same = shown(view.values("same_tokens", OUTPUTS), ".1%")
    differ = shown(view.values("logprob_difference", OUTPUTS), ".3g")
    compared = shown(view.values("compared_tokens", OUTPUTS), ".0f")
    return [
        f"Greedy decoding gave the same token ids in {same} of the requests, and log-probabilities that differ by at",
        f"most {differ} over {compared} tokens that both sides said in the same context. Requests were held back until",
        "all were in the queue, and log-probabilities of the chosen tokens were asked for on both sides.",
        "",
    ]
