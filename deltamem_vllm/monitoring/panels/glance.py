# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Six numbers that say whether all is well."""

from __future__ import annotations

from dataclasses import replace

from deltamem_vllm.monitoring import scope, thresholds
from deltamem_vllm.monitoring.model import Panel, Query, Row, Threshold
from deltamem_vllm.monitoring.scope import DASHBOARD

# Single numbers of counters are of the time range that Grafana shows, not of the last moments.
_SHOWN = replace(DASHBOARD, window="$__range")
_UP = 'min(up{instance=~"$instance", job="deltamem"})'

GLANCE = Row(
    "At a glance",
    (
        Panel(
            "Servers up",
            (Query(_UP, "all up"),),
            "none",
            "1 when every chosen server answers Prometheus, 0 when one does not.",
            "See the alert [DeltaMemServerDown](#deltamemserverdown).",
            threshold=Threshold(1, "below"),
            kind="stat",
            width=4,
        ),
        Panel(
            "Capacity now",
            (Query(scope.capacity_factor(DASHBOARD), "times"),),
            "none",
            "Tokens held in the memory of one, now. No value while nothing runs.",
            "See *Effective capacity*.",
            kind="stat",
            width=4,
        ),
        Panel(
            "Saved now",
            (Query(scope.saved_bytes(DASHBOARD), "saved"),),
            "bytes",
            "KV bytes that the live requests would hold more without the policy.",
            "0 while nothing runs or nothing had to be evicted. See *Saved bytes by tier*.",
            kind="stat",
            width=4,
        ),
        Panel(
            "Fullest pool",
            (Query(f"max({DASHBOARD.of('vllm:kv_cache_usage_perc')})", "in use"),),
            "percentunit",
            "Share of the KV blocks in use, on the engine where it is highest.",
            "See *Block pool in use*.",
            threshold=Threshold(thresholds.POOL_USE),
            kind="stat",
            width=4,
        ),
        Panel(
            "Preemptions shown",
            (Query(_SHOWN.increase("vllm:num_preemptions_total"), "preempted"),),
            "short",
            "Requests that vLLM preempted in the time shown.",
            "See *Preemptions*.",
            threshold=Threshold(1),
            kind="stat",
            width=4,
        ),
        Panel(
            "Refused share",
            (Query(scope.refused_share(_SHOWN), "refused"),),
            "percentunit",
            "Share of the requests in the time shown that were answered with 400 by the policy.",
            "See *Refused requests by reason*.",
            threshold=Threshold(thresholds.REFUSED_SHARE),
            kind="stat",
            width=4,
        ),
    ),
)
