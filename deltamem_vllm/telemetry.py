# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Counting what happens, by the table of metrics (`metrics_table.py`).

The scheduler counts with `Telemetry`. The engine and the API servers are different processes. The numbers cross over in
a `dict[str, int]` (the only thing vLLM carries for us), so every quantity is an integer while it travels: seconds are
counted in micro- or nanoseconds and turned into seconds where they are shown, and shares are observed in permille.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltamem_vllm.metrics_table import BY_KEY, METRICS, PERMILLE, Kind, Metric, metric, share

__all__ = ["CARRIER_PREFIX", "METRICS", "Metric", "Telemetry", "decode", "encode", "metric", "share"]

CARRIER_PREFIX = "deltamem:"


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
            if row.side == "engine" and row.kind != "histogram":
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

    def observe(self, key: str, part: int, whole: int) -> None:
        """Count a share ``part / whole`` in a histogram, rounded up to a whole permille; 0 <= part <= whole, 0 < whole.

        Parameters
        ----------
        key : str
            A histogram's key in `METRICS`.
        part, whole : int
            In the same unit, whatever it is.
        """
        permille = -(-part * PERMILLE // whole)
        self._check(key, "histogram", str(permille))
        if not 0 <= part <= whole:
            raise ValueError(f"histogram {key!r} observes shares from 0 to 1, got {part} of {whole}")
        name = (key, str(permille))
        self._counters[name] = self._counters.get(name, 0) + 1

    def level(self, key: str, value: int, label: str | None = None) -> None:
        """Replace a level; parameters as for `count`."""
        self._check(key, "gauge", label)
        self._levels[key, label] = value

    def drain(self) -> dict[str, int]:
        """Return what to send to an API server, and start the next round.

        Returns
        -------
        dict of str to int
            Growth of each counter that grew since the last call, and every level, by `encode`d name. Histograms
            are counters by permille. Each call's counters must be added exactly once: nothing is sent twice.
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
            `{"counters": {...}, "levels": {...}, "histograms": {...}}`, JSON-able. A metric with a label is a dict
            by label value; a histogram has ``count``, ``sum`` and cumulative ``buckets`` by upper bound.
        """
        return {
            "counters": _nested(self._counters, "counter"),
            "levels": _nested(self._levels, "gauge"),
            "histograms": {row.name: _summed(self._counters, row) for row in METRICS if row.kind == "histogram"},
        }

    @staticmethod
    def _check(key: str, kind: Kind, label: str | None) -> None:
        row = BY_KEY.get(key) or metric(key)
        if row.kind != kind:
            raise ValueError(f"{key!r} is a {row.kind}, not a {kind}; see deltamem_vllm.telemetry.METRICS")
        if kind != "histogram" and (label is None) != (row.label is None):
            wanted = f"needs a value for its label {row.label!r}" if row.label else "has no label"
            raise ValueError(f"metric {key!r} {wanted}, got {label!r}")


def _nested(values: Mapping[tuple[str, str | None], int], kind: Kind) -> dict[str, Any]:
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


def _summed(values: Mapping[tuple[str, str | None], int], row: Metric) -> dict[str, Any]:
    """A histogram from its counters by permille."""
    seen = {int(label): value for (key, label), value in values.items() if key == row.key and label is not None}
    buckets = {
        str(bound): sum(value for permille, value in seen.items() if share(permille) <= bound) for bound in row.buckets
    }
    count = sum(seen.values())
    return {
        "count": count,
        "sum": sum(permille * value for permille, value in seen.items()) / PERMILLE,
        "buckets": {**buckets, "+Inf": count},
    }


def _by_name(item: tuple[tuple[str, str | None], int]) -> tuple[str, str]:
    (key, label), _ = item
    return key, label or ""
