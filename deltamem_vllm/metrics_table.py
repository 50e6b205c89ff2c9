# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The one table of metrics: what deltamem counts.

The exporter, the JSON routes, `docs/reference/metrics.md`, the dashboards and the alert rules read names, labels and
units from `METRICS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PERMILLE = 1000
"""Steps of an observed share. Bounds of buckets are whole steps, and shares are rounded up to one, so that every
observation is counted in the very bucket it belongs to; their sum is too high by less than a step each."""

# Where a metric is counted: with the scheduler (one per engine), or where HTTP requests arrive.
Side = Literal["engine", "api_server"]
Kind = Literal["counter", "gauge", "histogram"]
Number = int | float


@dataclass(frozen=True)
class Metric:
    """One row of the table.

    Parameters
    ----------
    key : str
        What the code that counts calls it.
    name : str
        Public name without the `deltamem_` prefix and, for counters, without `_total`; also the
        field of the JSON route.
    kind : {"counter", "gauge", "histogram"}
        A counter only grows; a gauge is a level that replaces the one before; a histogram counts observed
        shares by size.
    help : str
        One sentence for people: HELP line, OpenAPI description and reference page.
    label : str or None
        The one label of this metric beside those that every metric carries.
    initial : tuple of str
        Label values shown as zero before anything was counted. Others appear with their first count.
    scale : float
        Public value = counted integer * scale.
    side : {"engine", "api_server"}
        Which process counts it.
    buckets : tuple of float
        Upper bounds of a histogram's buckets, ascending, in whole permille; +Inf comes on top.
    """

    key: str
    name: str
    kind: Kind
    help: str
    label: str | None = None
    initial: tuple[str, ...] = ()
    scale: float = 1
    side: Side = "engine"
    buckets: tuple[float, ...] = ()

    @property
    def public_name(self) -> str:
        """The name as scraped from /metrics."""
        return f"deltamem_{self.name}{'_total' if self.kind == 'counter' else ''}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names as scraped from /metrics, in order."""
        # A request refused by an API server was not routed to any engine yet.
        common = ("model_name", "engine") if self.side == "engine" else ("model_name",)
        return common if self.label is None else (*common, self.label)

    def public_value(self, amount: int) -> Number:
        """Turn the counted integer into the public unit."""
        return amount if self.scale == 1 else amount * self.scale


_MICRO = 1e-6
_NANO = 1e-9

METRICS: tuple[Metric, ...] = (
    Metric("compactions", "compactions", "counter", "KV compactions that were applied."),
    Metric(
        "evicted_tokens",
        "evicted_tokens",
        "counter",
        "KV slots that evictions freed, summed over requests. With cold pages, fewer tokens are gone.",
    ),
    Metric(
        "evictions",
        "evictions",
        "counter",
        "KV compactions that were applied, by what made them due: a request was over its budget (mode always), the "
        "pool was past its watermark (pressure), or the step would not have fit (short).",
        label="reason",
        initial=("budget", "pressure", "short"),
    ),
    Metric("freed_blocks", "freed_blocks", "counter", "KV blocks that compactions gave back to vLLM's pool."),
    Metric(
        "compaction_us",
        "compaction_seconds",
        "counter",
        "Time spent in compactions: scoring, choosing survivors and moving them.",
        scale=_MICRO,
    ),
    Metric(
        "scoring_us",
        "scoring_seconds",
        "counter",
        "Time spent on scoring resident entries: in compactions, where it is a part of their time, and for probes.",
        scale=_MICRO,
    ),
    Metric(
        "policy_ns",
        "policy_seconds",
        "counter",
        "Time the scheduler spent deciding what to compact. With deltamem_compaction_seconds_total it is the policy's "
        "whole overhead.",
        scale=_NANO,
    ),
    Metric(
        "kept_share",
        "kept_share",
        "histogram",
        "Share of its KV bytes that a request keeps, of those of all tokens it has seen, at each compaction.",
        buckets=(0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    ),
    Metric(
        "skipped",
        "compactions_skipped",
        "counter",
        "Compactions that were due but could not be done in their step, by reason.",
        label="reason",
        initial=("no_free_blocks", "shared_prefix"),
    ),
    Metric(
        "pressure_blocks",
        "pressure_blocks",
        "counter",
        "KV blocks taken from requests because the pool filled (mode pressure).",
    ),
    Metric(
        "probes",
        "probes",
        "counter",
        "Questions to the workers what a request's cached tokens are worth.",
    ),
    Metric(
        "preempted_compacted",
        "preempted_compacted_requests",
        "counter",
        "Compacted requests that vLLM preempted; they are recomputed densely and start over.",
    ),
    Metric(
        "preemptions_avoided",
        "preemptions_avoided",
        "counter",
        "Running requests that vLLM would have preempted in a step, for lack of blocks, had nothing been compacted in "
        "it; less those it preempts all the same. As if each gave all its blocks back: with shared blocks, at least.",
    ),
    Metric(
        "requests_refused",
        "requests_refused",
        "counter",
        "Requests answered with HTTP 400 because the policy cannot serve them as asked, by reason.",
        label="reason",
        initial=("bad_option", "does_not_fit", "prompt_logprobs", "streaming_session"),
        side="api_server",
    ),
    Metric("resident_tokens", "resident_tokens", "gauge", "KV slots held by the live requests."),
    Metric(
        "logical_tokens",
        "logical_tokens",
        "gauge",
        "Tokens the live requests have computed, evicted ones included.",
    ),
    Metric("resident_bytes", "resident_bytes", "gauge", "KV bytes of the resident tokens of the live requests."),
    Metric(
        "logical_bytes",
        "logical_bytes",
        "gauge",
        "KV bytes the live requests would hold if nothing were evicted.",
    ),
    Metric(
        "budget_bytes",
        "budget_bytes",
        "gauge",
        "KV bytes of the live requests if each were cut to its budget now, never more than it holds. Requests that the "
        "policy leaves alone count with all they hold. Measured twice a second at most.",
    ),
    Metric(
        "compacted_requests",
        "compacted_requests",
        "gauge",
        "Live requests that have been compacted at least once.",
    ),
    Metric(
        "dealt_requests",
        "dealt_requests",
        "gauge",
        "Live requests whose pages were dealt to layers and heads.",
    ),
    Metric(
        "tier_bytes",
        "tier_bytes",
        "gauge",
        "KV bytes of the live requests by tier.",
        label="tier",
        initial=("hot", "cold"),
    ),
    Metric(
        "cold_tokens",
        "cold_tokens",
        "gauge",
        "Tokens of the live requests in cold pages, as a mean over layers and heads.",
    ),
    Metric(
        "reserve_blocks",
        "reserve_blocks",
        "gauge",
        "KV blocks kept free so that a compaction can always start.",
    ),
)

BY_KEY: Mapping[str, Metric] = {metric.key: metric for metric in METRICS}


def metric(key: str) -> Metric:
    """Look up a row of the table; KeyError names the valid keys."""
    try:
        return BY_KEY[key]
    except KeyError:
        raise KeyError(f"unknown metric {key!r}; valid keys: {', '.join(sorted(BY_KEY))}") from None


def share(permille: int) -> float:
    """An observation in the public unit. Divided, not multiplied by 0.001: 0.3 must come out as the bound 0.3."""
    return permille / PERMILLE
