# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How much is evicted, why, what is left, and what it costs."""

from __future__ import annotations

from dataclasses import replace

from deltamem_vllm.monitoring import scope, thresholds
from deltamem_vllm.monitoring.model import Panel, Query, Row, Threshold
from deltamem_vllm.monitoring.names import POLICY_INFO
from deltamem_vllm.monitoring.scope import DASHBOARD, PER_ENGINE

_WINDOW = DASHBOARD.window
_BUCKETS = f"increase({DASHBOARD.of('deltamem_kept_share_bucket')}[{_WINDOW}])"
_REFUSED = f"increase({DASHBOARD.of_servers('deltamem_requests_refused_total')}[{_WINDOW}])"
_MEAN = replace(DASHBOARD, total="avg")
_SPENT = DASHBOARD.rate("deltamem_compaction_seconds_total")
_COMPACTIONS = DASHBOARD.rate("deltamem_compactions_total")

EVICTION = Row(
    "Eviction",
    (
        Panel(
            "Evictions by reason",
            (
                Query(
                    f"sum by (reason) (increase({DASHBOARD.of('deltamem_evictions_total')}[{_WINDOW}]))", "{{reason}}"
                ),
            ),
            "short",
            "Compactions applied, by reason: `budget` (mode `always`, or coverage), `pressure` (the pool was past its "
            "watermark), `short` (a step's requests would not have fitted).",
            "Many `short`: the pool fills faster than the watermark foresees. Lower `high_watermark`, or "
            "`--max-num-batched-tokens`.",
            stacked=True,
        ),
        Panel(
            "Kept share, distribution",
            (Query(f"sum by (le) ({_BUCKETS})", "{{le}}"),),
            "percentunit",
            "How many compactions left a request with which share of its KV bytes. The darker, the more.",
            "All of it in the lowest rows: requests are squeezed to their budgets. Check quality with `deltamem eval` "
            "at that share, raise `keep_ratio`, or give the pool more room.",
            kind="heatmap",
        ),
        Panel(
            "Kept share, quantiles",
            tuple(Query(scope.kept_share_quantile(DASHBOARD, q), f"p{round(q * 100)}") for q in (0.1, 0.5, 0.9)),
            "percentunit",
            "The same as quantiles: a tenth, half and nine tenths of the compactions left less than that.",
            "Below the line by default settings lose the most answers "
            "([measured on a small model](../results/cold.md)). Raise `keep_ratio`, or serve fewer requests at once.",
            threshold=Threshold(thresholds.KEPT_SHARE, "below"),
        ),
        Panel(
            "Evicted tokens and freed blocks",
            (
                Query(DASHBOARD.rate("deltamem_evicted_tokens_total"), "tokens' slots freed"),
                Query(DASHBOARD.rate("deltamem_freed_blocks_total"), "blocks given back"),
                Query(DASHBOARD.rate("deltamem_pressure_blocks_total"), "of them under pressure"),
            ),
            "short",
            "KV slots and blocks that compactions gave back to vLLM's pool, a second; and the blocks that were taken "
            "because the pool filled.",
            "Slots are freed but few blocks: requests are so short that rounding to blocks eats the gain; raise "
            "`min_tokens`, or lower `--block-size`.",
        ),
        Panel(
            "Skipped compactions by reason",
            (
                Query(
                    f"sum by (reason) (increase({DASHBOARD.of('deltamem_compactions_skipped_total')}[{_WINDOW}]))",
                    "{{reason}}",
                ),
            ),
            "short",
            "Compactions that were due and could not be done in their step. `shared_prefix` is no fault: a prompt that "
            "many requests share is cheaper left shared. A request that stays due counts in every step.",
            "`no_free_blocks`: see the alert [DeltaMemCompactionsSkipped](#deltamemcompactionsskipped).",
        ),
        Panel(
            "Refused requests by reason",
            (Query(f"sum by (reason) ({_REFUSED})", "{{reason}}"),),
            "short",
            "Requests answered with 400 because the policy cannot serve them as asked.",
            "See the alert [DeltaMemRefusals](#deltamemrefusals), which says what each reason means.",
        ),
    ),
)

COST = Row(
    "Cost of the policy",
    (
        Panel(
            "Policy overhead",
            (
                Query(scope.overhead(PER_ENGINE), "{{instance}} engine {{engine}}"),
                Query(_MEAN.rate("deltamem_policy_seconds_total"), "mean of deciding"),
                Query(_MEAN.rate("deltamem_compaction_seconds_total"), "mean of compacting"),
                Query(_MEAN.rate("deltamem_scoring_seconds_total"), "of it scoring"),
            ),
            "percentunit",
            "Share of wall time that each engine spends on deciding what to evict and on compacting; and of what it "
            "consists, as a mean over the engines.",
            "Above the line: see the alert [DeltaMemOverheadHigh](#deltamemoverheadhigh).",
            threshold=Threshold(thresholds.OVERHEAD),
        ),
        Panel(
            "Time of a compaction",
            (Query(f"{_SPENT} / ({_COMPACTIONS} > 0)", "mean"),),
            "s",
            "Mean time of a compaction: scoring, choosing survivors, moving them. No value while there is none.",
            "It stands between two steps of all requests. Longer than a step: shorter prompts at once "
            "(`--max-num-batched-tokens`), a larger `interval`, or another `scorer`.",
        ),
        Panel(
            "Compactions and probes",
            (
                Query(_COMPACTIONS, "compactions"),
                Query(DASHBOARD.rate("deltamem_probes_total"), "probes"),
            ),
            "short",
            "Compactions a second, and questions to the workers what a request's tokens are worth (mode `pressure` and "
            "`coverage`).",
            "Many probes and few compactions: the pool swings around its watermark; set `low_watermark` lower.",
        ),
        Panel(
            "Active policies",
            (Query(DASHBOARD.of(POLICY_INFO), ""),),
            "none",
            "What each engine runs with: version and settings.",
            "Rows should differ only where you meant it; two versions for one model fire "
            "[DeltaMemMixedVersions](#deltamemmixedversions).",
            kind="table",
            width=24,
        ),
    ),
)
