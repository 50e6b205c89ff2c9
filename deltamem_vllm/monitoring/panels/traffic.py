# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What vLLM itself says: how much is served, how fast, and how full the pool is."""

from __future__ import annotations

from deltamem_vllm.monitoring import thresholds
from deltamem_vllm.monitoring.model import Panel, Query, Row, Threshold
from deltamem_vllm.monitoring.scope import DASHBOARD, PER_ENGINE

_PER_ENGINE = "{{instance}} engine {{engine}}"


def _quantiles(histogram: str) -> tuple[Query, ...]:
    buckets = f"sum by (le) (rate({DASHBOARD.of(f'{histogram}_bucket')}[{DASHBOARD.window}]))"
    return tuple(
        Query(f"histogram_quantile({quantile}, {buckets})", f"p{round(quantile * 100)}")
        for quantile in (0.5, 0.95, 0.99)
    )


_HITS = DASHBOARD.rate("vllm:prefix_cache_hits_total")
_ASKED = DASHBOARD.rate("vllm:prefix_cache_queries_total")
_FINISHED = f"rate({DASHBOARD.of('vllm:request_success_total')}[{DASHBOARD.window}])"

TRAFFIC = Row(
    "Traffic and latency (vLLM)",
    (
        Panel(
            "Tokens a second",
            (
                Query(DASHBOARD.rate("vllm:prompt_tokens_total"), "prompt"),
                Query(DASHBOARD.rate("vllm:generation_tokens_total"), "generated"),
            ),
            "short",
            "Prompt tokens read and tokens generated, a second.",
            "Falls while requests wait: look at *Block pool in use* and *Policy overhead*.",
        ),
        Panel(
            "Time to first token",
            _quantiles("vllm:time_to_first_token_seconds"),
            "s",
            "From a request's arrival to its first token, waiting included.",
            "Rises with *Running and waiting*: requests wait for blocks. Lower `keep_ratio` or `keep_tokens`, or add a "
            "replica.",
        ),
        Panel(
            "Time per output token",
            _quantiles("vllm:request_time_per_output_token_seconds"),
            "s",
            "Mean time between the tokens of a finished request.",
            "Rises with more requests at once, which is what eviction makes room for: bound them with "
            "`--max-num-seqs`. If *Policy overhead* rises with it, see there.",
        ),
        Panel(
            "Running and waiting",
            (
                Query(DASHBOARD.sum("vllm:num_requests_running"), "running"),
                Query(DASHBOARD.sum("vllm:num_requests_waiting"), "waiting"),
            ),
            "short",
            "Requests in the batch, and requests that wait for a place or for blocks.",
            "Many wait while the pool is not full: raise `--max-num-seqs`. While it is full: lower what each request "
            "keeps, or add a replica.",
        ),
        Panel(
            "Block pool in use",
            (Query(PER_ENGINE.sum("vllm:kv_cache_usage_perc"), _PER_ENGINE),),
            "percentunit",
            "Share of vLLM's KV blocks that requests hold, for each engine. In mode `pressure` it is meant to stand "
            "between `low_watermark` and `high_watermark` under load.",
            "Above the line: eviction does not keep up; see the alert [DeltaMemPoolFull](#deltamempoolfull).",
            threshold=Threshold(thresholds.POOL_USE),
        ),
        Panel(
            "Preemptions",
            (
                Query(DASHBOARD.increase("vllm:num_preemptions_total"), "preempted by vLLM"),
                Query(DASHBOARD.increase("deltamem_preempted_compacted_requests_total"), "of them compacted"),
                Query(DASHBOARD.increase("deltamem_preemptions_avoided_total"), "avoided by eviction"),
            ),
            "short",
            "Requests that vLLM threw out of the pool and computes again; those of them that had been compacted, and "
            "start over with their full cache; and those that had to go if nothing had been compacted in that step.",
            "*Preempted* above zero for long: see the alert [DeltaMemPreemptions](#deltamempreemptions). "
            "*Avoided* is what eviction is for.",
        ),
        Panel(
            "Prefix cache hits",
            (Query(f"{_HITS} / ({_ASKED} > 0)", "hits"),),
            "percentunit",
            "Share of prompt tokens found in the prefix cache. Compacted requests write nothing new to it; the blocks "
            "they leave behind stay until they are needed.",
            "Falls when a full pool drops cached blocks: a shared system prompt needs a larger pool or fewer requests "
            "at once.",
        ),
        Panel(
            "Queue time",
            _quantiles("vllm:request_queue_time_seconds"),
            "s",
            "How long requests waited before they were first scheduled.",
            "As for *Time to first token*, of which it is a part.",
        ),
        Panel(
            "Finished requests",
            (Query(f"sum by (finished_reason) ({_FINISHED})", "{{finished_reason}}"),),
            "reqps",
            "Requests finished a second: `stop` and `length` are answers, `abort` is a client that left.",
            "Many `length` after eviction was turned on or made stronger: texts may no longer end by themselves. "
            "Compare with `deltamem_policy: off` and raise `keep_ratio`.",
            stacked=True,
        ),
    ),
)
