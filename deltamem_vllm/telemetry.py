# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What deltamem counts: the one table of metrics, and the counting itself.

The scheduler counts with `Telemetry`; the Prometheus exporter, the JSON route and
`docs/reference/metrics.md` read their names, labels and units from `METRICS`.

The engine and the API servers are different processes. The numbers cross over in a `dict[str, int]`
(the only thing vLLM carries for us), so every quantity is an integer while it travels: seconds are
counted in microseconds and turned into seconds where they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

CARRIER_PREFIX = "deltamem:"

# Where a metric is counted: with the scheduler (one per engine), or where HTTP requests arrive.
Side = Literal["engine", "api_server"]
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
    kind : {"counter", "gauge"}
        A counter only grows; a gauge is a level that replaces the one before.
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
    """

    key: str
    name: str
    kind: Literal["counter", "gauge"]
    help: str
    label: str | None = None
    initial: tuple[str, ...] = ()
    scale: float = 1
    side: Side = "engine"

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

METRICS: tuple[Metric, ...] = (
    Metric("compactions", "compactions", "counter", "KV compactions that were applied."),
    Metric(
        "evicted_tokens",
        "evicted_tokens",
        "counter",
        "KV slots that evictions freed, summed over requests. With cold pages, fewer tokens are gone.",
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
        "The part of deltamem_compaction_seconds_total spent on scoring resident entries.",
        scale=_MICRO,
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


def encode(key: str, label: str | None = None) -> str:
    """Name a number for the carrier: `deltamem:<key>` or `deltamem:<key>:<label value>`."""
    return f"{CARRIER_PREFIX}{key}" if label is None else f"{CARRIER_PREFIX}{key}:{label}"


def decode(name: str) -> tuple[Metric, str | None] | None:
    """Read a carrier name back; None if it is not one of ours.

    Raises
    ------
    KeyError
        The name carries our prefix but no known metric: two versions of deltamem are mixed.
    """
    if not name.startswith(CARRIER_PREFIX):
        return None
    # Keys never hold a colon, label values may.
    key, separator, label = name.removeprefix(CARRIER_PREFIX).partition(":")
    return metric(key), label if separator else None


class Telemetry:
    """The numbers of one engine: counters that grow, levels that are replaced.

    Not thread-safe: the scheduler's thread is the only caller. `count` and `level` cost a lookup and a
    dict write.
    """

    def __init__(self) -> None:
        self._counters: dict[tuple[str, str | None], int] = {}
        self._drained: dict[tuple[str, str | None], int] = {}
        self._levels: dict[tuple[str, str | None], int] = {}
        for row in METRICS:
            values = self._levels if row.kind == "gauge" else self._counters
            if row.side == "engine":
                for label in (None,) if row.label is None else row.initial:
                    values[row.key, label] = 0

    def count(self, key: str, amount: int = 1, label: str | None = None) -> None:
        """Add to a counter.

        Parameters
        ----------
        key : str
            A counter's key in `METRICS`.
        amount : int
            What to add, in the key's own unit (`_us` is microseconds). Not negative.
        label : str or None
            The value of the metric's label; needed if and only if it has one.
        """
        self._check(key, "counter", label)
        if amount < 0:
            raise ValueError(f"counter {key!r} cannot shrink, got {amount}; use level() for a gauge")
        self._counters[key, label] = self._counters.get((key, label), 0) + amount

    def level(self, key: str, value: int, label: str | None = None) -> None:
        """Replace a level; parameters as for `count`."""
        self._check(key, "gauge", label)
        self._levels[key, label] = value

    def drain(self) -> dict[str, int]:
        """Return what to send to an API server, and start the next round.

        Returns
        -------
        dict of str to int
            Growth of each counter that grew since the last call, and every level, by `encode`d name.
            Each call's counters must be added exactly once: nothing is sent twice.
        """
        carried = {}
        for name, total in self._counters.items():
            grown = total - self._drained.get(name, 0)
            if grown:
                carried[encode(*name)] = grown
                self._drained[name] = total
        for name, value in self._levels.items():
            carried[encode(*name)] = value
        return carried

    def totals(self) -> dict[str, dict[str, Any]]:
        """Return everything counted so far in public units, without draining.

        Returns
        -------
        dict
            `{"counters": {...}, "levels": {...}}`, JSON-able. A metric with a label is a dict by label value.
        """
        return {"counters": _nested(self._counters, "counter"), "levels": _nested(self._levels, "gauge")}

    @staticmethod
    def _check(key: str, kind: str, label: str | None) -> None:
        row = BY_KEY.get(key) or metric(key)
        if row.kind != kind:
            raise ValueError(f"{key!r} is a {row.kind}, not a {kind}; see deltamem_vllm.telemetry.METRICS")
        if (label is None) != (row.label is None):
            wanted = f"needs a value for its label {row.label!r}" if row.label else "has no label"
            raise ValueError(f"metric {key!r} {wanted}, got {label!r}")


def _nested(values: Mapping[tuple[str, str | None], int], kind: str) -> dict[str, Any]:
    """Group numbers by public name, in the table's order."""
    nested: dict[str, Any] = {}
    for row in METRICS:
        if row.kind != kind or row.side != "engine":
            continue
        if row.label is None:
            nested[row.name] = row.public_value(values[row.key, None])
        else:
            nested[row.name] = {
                label: row.public_value(value)
                for (key, label), value in sorted(values.items(), key=_by_name)
                if key == row.key and label is not None
            }
    return nested


def _by_name(item: tuple[tuple[str, str | None], int]) -> tuple[str, str]:
    (key, label), _ = item
    return key, label or ""
