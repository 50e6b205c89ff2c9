# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Formulas that the dashboard and the rules share, each over its own selection of engines."""

from __future__ import annotations

from dataclasses import dataclass

from deltamem_vllm.monitoring.model import ENGINE_LABELS, SERVER_LABELS


@dataclass(frozen=True)
class Scope:
    """Which series a formula reads and what it is summed over.

    Parameters
    ----------
    total, server_total : str
        The aggregation, e.g. `sum` or `sum by (engine)`, and that of series that have no engine.
    server_matchers : tuple of str
        Label matchers of series that have no engine.
    engine_matchers : tuple of str
        Further matchers of series that have one.
    window : str
        Range of `rate` and `increase`.
    """

    total: str
    server_total: str
    server_matchers: tuple[str, ...]
    engine_matchers: tuple[str, ...]
    window: str

    def of(self, name: str, *matchers: str) -> str:
        """Select a metric of engines."""
        return _select(name, (*self.server_matchers, *self.engine_matchers, *matchers))

    def of_servers(self, name: str, *matchers: str) -> str:
        """Select a metric that is counted before a request has an engine."""
        return _select(name, (*self.server_matchers, *matchers))

    def sum(self, name: str, *matchers: str) -> str:
        """Sum a gauge."""
        return f"{self.total} ({self.of(name, *matchers)})"

    def rate(self, name: str, *matchers: str) -> str:
        """Sum a counter's growth a second."""
        return f"{self.total} (rate({self.of(name, *matchers)}[{self.window}]))"

    def increase(self, name: str, *matchers: str) -> str:
        """Sum a counter's growth in the window."""
        return f"{self.total} (increase({self.of(name, *matchers)}[{self.window}]))"


def _select(name: str, matchers: tuple[str, ...]) -> str:
    return f"{name}{{{', '.join(matchers)}}}" if matchers else name


_SERVERS = ('model_name=~"$model_name"', 'instance=~"$instance"')

DASHBOARD = Scope("sum", "sum", _SERVERS, ('engine=~"$engine"',), "$__rate_interval")
"""All engines chosen in Grafana, together."""

PER_ENGINE = Scope(
    "sum by (instance, engine)", "sum by (instance)", _SERVERS, ('engine=~"$engine"',), "$__rate_interval"
)
"""The engines chosen in Grafana, each for itself."""

RULES = Scope(f"sum by ({ENGINE_LABELS})", f"sum by ({SERVER_LABELS})", (), (), "5m")
"""Every engine that Prometheus knows, each for itself."""


def saved_bytes(scope: Scope) -> str:
    """KV bytes that the live requests would hold more without the policy."""
    return f"{scope.sum('deltamem_logical_bytes')} - {scope.sum('deltamem_tier_bytes')}"


def token_bytes(scope: Scope) -> str:
    """KV bytes of one token in full, per engine; no value while there is no token."""
    return f"{scope.of('deltamem_logical_bytes')} / ({scope.of('deltamem_logical_tokens')} > 0)"


def saved_by_cold(scope: Scope) -> str:
    """KV bytes saved because tokens are written in fewer bits: what they would take in full, less what they take."""
    cold = scope.of("deltamem_tier_bytes", 'tier="cold"')
    in_full = f"{scope.of('deltamem_cold_tokens')} * {token_bytes(scope)}"
    return f"{scope.total} ({in_full} - ignoring (tier) {cold})"


def saved_by_eviction(scope: Scope) -> str:
    """KV bytes saved because tokens are gone: all, less those in full, less what cold ones would take in full."""
    hot = scope.of("deltamem_tier_bytes", 'tier="hot"')
    in_full = f"{scope.of('deltamem_cold_tokens')} * {token_bytes(scope)}"
    return f"{scope.total} ({scope.of('deltamem_logical_bytes')} - ignoring (tier) {hot} - {in_full})"


def capacity_factor(scope: Scope) -> str:
    """How many times the tokens are held that vLLM alone would hold in the same memory; no value while idle."""
    return f"{scope.sum('deltamem_logical_tokens')} / ({scope.sum('deltamem_resident_tokens')} > 0)"


def floor_share(scope: Scope) -> str:
    """What the live requests may be cut down to, as a share of their KV bytes; no value while idle."""
    return f"{scope.sum('deltamem_budget_bytes')} / ({scope.sum('deltamem_logical_bytes')} > 0)"


def compacted_share(scope: Scope) -> str:
    """Share of the requests in the batch that were compacted; no value while idle."""
    return f"{scope.sum('deltamem_compacted_requests')} / ({scope.sum('vllm:num_requests_running')} > 0)"


def overhead(scope: Scope) -> str:
    """Seconds a second that an engine spends deciding and compacting."""
    return f"{scope.rate('deltamem_policy_seconds_total')} + {scope.rate('deltamem_compaction_seconds_total')}"


def refused_share(scope: Scope) -> str:
    """Share of refused requests among those answered or refused; no value without requests."""
    refused = f"{scope.server_total} (rate({scope.of_servers('deltamem_requests_refused_total')}[{scope.window}]))"
    answered = f"{scope.server_total} (rate({scope.of_servers('vllm:request_success_total')}[{scope.window}]))"
    return f"{refused} / ({refused} + {answered} > 0)"


def kept_share_quantile(scope: Scope, quantile: float) -> str:
    """What a request was left with by a compaction, as a quantile over the window's compactions."""
    by = "le" if scope.total == "sum" else f"le, {ENGINE_LABELS}"
    buckets = f"rate({scope.of('deltamem_kept_share_bucket')}[{scope.window}])"
    return f"histogram_quantile({quantile}, sum by ({by}) ({buckets}))"
