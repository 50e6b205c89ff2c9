# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the live requests hold, what they would hold, and what they may hold."""

from __future__ import annotations

from deltamem_vllm.monitoring import scope
from deltamem_vllm.monitoring.model import Panel, Query, Row
from deltamem_vllm.monitoring.scope import DASHBOARD

MEMORY = Row(
    "KV memory",
    (
        Panel(
            "KV bytes against the budget",
            (
                Query(f"sum by (tier) ({DASHBOARD.of('deltamem_tier_bytes')})", "held, {{tier}}"),
                Query(DASHBOARD.sum("deltamem_resident_bytes"), "held, all"),
                Query(DASHBOARD.sum("deltamem_budget_bytes"), "budget"),
                Query(DASHBOARD.sum("deltamem_logical_bytes"), "without eviction"),
            ),
            "bytes",
            "KV bytes of the live requests: held in full (`hot`) and in fewer bits (`cold`), what would be left if "
            "each were cut to its budget now, and what they would hold with vLLM alone.",
            "Held stays at the budget: nothing is left to evict; see the alert "
            "[DeltaMemKeptShareAtFloor](#deltamemkeptshareatfloor). Held is at *without eviction*: there was no need "
            "to evict, or requests are shorter than `min_tokens`.",
            width=12,
        ),
        Panel(
            "Saved bytes by tier",
            (
                Query(scope.saved_by_eviction(DASHBOARD), "evicted tokens"),
                Query(scope.saved_by_cold(DASHBOARD), "cold tokens in fewer bits"),
            ),
            "bytes",
            "KV bytes that the live requests would hold more: because tokens are gone, and because tokens are written "
            "in fewer bits. Their sum is *without eviction* less *held*. No value while nothing runs.",
            "Only *evicted* on a CPU: cold pages are off; the server's log says why at start "
            "(see [Not visible here](#not-visible-here)).",
            stacked=True,
            width=12,
        ),
        Panel(
            "Logical and resident tokens",
            (
                Query(DASHBOARD.sum("deltamem_logical_tokens"), "logical"),
                Query(DASHBOARD.sum("deltamem_resident_tokens"), "resident slots"),
                Query(DASHBOARD.sum("deltamem_cold_tokens"), "of them cold tokens"),
            ),
            "short",
            "Tokens the live requests have computed, KV slots they hold, and tokens in cold pages (mean over layers "
            "and heads; several of them share the slots of one).",
            "The distance between the first two is what eviction gives. None: see *KV bytes against the budget*.",
        ),
        Panel(
            "Effective capacity",
            (Query(scope.capacity_factor(DASHBOARD), "logical / resident"),),
            "none",
            "Tokens held in the memory of one: with 4, the pool serves what would need four times its blocks. "
            "No value while nothing runs.",
            "At 1 nothing is evicted: the pool has room, or `keep_ratio` is 1, or requests are short.",
        ),
        Panel(
            "Requests by treatment",
            (
                Query(DASHBOARD.sum("vllm:num_requests_running"), "running"),
                Query(DASHBOARD.sum("deltamem_compacted_requests"), "compacted"),
                Query(DASHBOARD.sum("deltamem_dealt_requests"), "pages dealt"),
            ),
            "short",
            "Requests in the batch, live requests that were compacted at least once, and those whose pages were dealt "
            "to layers and heads.",
            "Compacted but not dealt: `dealing` is `equal`, or requests say so.",
        ),
        Panel(
            "Reserve",
            (Query(DASHBOARD.sum("deltamem_reserve_blocks"), "blocks"),),
            "short",
            "KV blocks kept free so that a compaction can always start. They are for the largest one still to come.",
            "A large part of the pool: a few very long requests. Fewer requests at once, or a larger pool.",
        ),
    ),
)
