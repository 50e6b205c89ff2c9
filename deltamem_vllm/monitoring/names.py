# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which metric names expressions may use, and which ones they do use."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deltamem_vllm.telemetry import METRICS, Metric

POLICY_INFO = "deltamem_policy_info"

PROMETHEUS_METRICS = ("up",)
"""What Prometheus itself adds for each target."""

VLLM_METRICS = (
    "vllm:generation_tokens_total",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prompt_tokens_total",
    "vllm:request_queue_time_seconds_bucket",
    "vllm:request_success_total",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_bucket",
)
"""vLLM's own series that are used, as scraped (`vllm/v1/metrics/loggers.py`, 0.32)."""

# Everything in PromQL that is a word and no metric: quoted text, matchers, ranges and label lists first, so
# that the words inside them are not looked at.
_NOT_NAMES = (
    r'"(?:\\.|[^"\\])*"',
    r"'(?:\\.|[^'\\])*'",
    r"\{[^}]*\}",
    r"\[[^\]]*\]",
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
    r"\b(?:and|or|unless|bool|offset|group_left|group_right)\b",
    r"(?i:\b(?:inf|nan)\b)",
)
# A word before a bracket is a function. A digit before it makes it a duration or an exponent.
_NAME = re.compile(r"(?<![\w:])[a-zA-Z_:][\w:]*+(?!\s*\()")


def series_names(row: Metric) -> tuple[str, ...]:
    """Return the names under which one row of the table is scraped."""
    if row.kind == "histogram":
        return tuple(f"{row.public_name}_{part}" for part in ("bucket", "sum", "count"))
    return (row.public_name,)


def allowed(metrics: Iterable[Metric] = METRICS) -> frozenset[str]:
    """Return every name that a panel may use."""
    ours = {name for row in metrics for name in series_names(row)}
    return frozenset({POLICY_INFO, *PROMETHEUS_METRICS, *VLLM_METRICS, *ours})


def used(expr: str) -> frozenset[str]:
    """Return the metric names in a PromQL expression.

    A selector by `__name__` could mean any metric; it is returned as that word, which nothing allows.
    """
    found = {"__name__"} if "__name__" in expr else set()
    for pattern in _NOT_NAMES:
        expr = re.sub(pattern, " ", expr)
    return frozenset(found | set(_NAME.findall(expr)))
