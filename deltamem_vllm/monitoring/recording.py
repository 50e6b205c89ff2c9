# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Series that Prometheus computes for each engine: what alerts and reports over weeks ask for."""

from __future__ import annotations

from deltamem_vllm.monitoring import scope
from deltamem_vllm.monitoring.model import RecordingRule
from deltamem_vllm.monitoring.scope import RULES

SAVED_BYTES = "engine:deltamem_saved_bytes:sum"
CAPACITY_FACTOR = "engine:deltamem_capacity_factor:ratio"
FLOOR_SHARE = "engine:deltamem_floor_share:ratio"
COMPACTED_SHARE = "engine:deltamem_compacted_requests:ratio"
OVERHEAD = "engine:deltamem_overhead:ratio_rate5m"
EVICTIONS = "engine:deltamem_evictions:rate5m"
KEPT_SHARE = "engine:deltamem_kept_share:median_rate5m"
PREEMPTIONS = "engine:vllm_preemptions:rate5m"
PREEMPTIONS_AVOIDED = "engine:deltamem_preemptions_avoided:rate5m"
REFUSED_SHARE = "server:deltamem_refused:ratio_rate5m"

RECORDING: tuple[RecordingRule, ...] = (
    RecordingRule(SAVED_BYTES, scope.saved_bytes(RULES)),
    RecordingRule(CAPACITY_FACTOR, scope.capacity_factor(RULES)),
    RecordingRule(FLOOR_SHARE, scope.floor_share(RULES)),
    RecordingRule(COMPACTED_SHARE, scope.compacted_share(RULES)),
    RecordingRule(OVERHEAD, scope.overhead(RULES)),
    RecordingRule(EVICTIONS, RULES.rate("deltamem_evictions_total")),
    RecordingRule(KEPT_SHARE, scope.kept_share_quantile(RULES, 0.5)),
    RecordingRule(PREEMPTIONS, RULES.rate("vllm:num_preemptions_total")),
    RecordingRule(PREEMPTIONS_AVOIDED, RULES.rate("deltamem_preemptions_avoided_total")),
    RecordingRule(REFUSED_SHARE, scope.refused_share(RULES)),
)
