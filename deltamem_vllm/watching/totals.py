# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The numbers of a server, added up over its engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Totals:
    """Sums over engines; None where a server does not tell (another version of it).

    Bytes are those of one tensor-parallel rank, as in `/deltamem/stats`.

    Parameters
    ----------
    pool_bytes, used_bytes : float
        What vLLM's block pool holds in all, and what live requests hold of it.
    hot_bytes, cold_bytes : float
        Resident entries in full and in fewer bits.
    logical_bytes, logical_tokens, resident_tokens : float
        What would be held had nothing been evicted; tokens of both kinds.
    running, waiting, compacted : float
        Requests.
    counters : mapping of str to float
        Every counter; labels are part of the name: `compactions_skipped{shared_prefix}`.
    """

    pool_bytes: float | None
    used_bytes: float | None
    hot_bytes: float | None
    cold_bytes: float | None
    logical_bytes: float | None
    logical_tokens: float | None
    resident_tokens: float | None
    running: float | None
    waiting: float | None
    compacted: float | None
    counters: Mapping[str, float]

    @classmethod
    def of(cls, stats: Mapping[str, Any]) -> Totals:
        """Read an answer of `GET /deltamem/stats`."""
        engines = [engine for engine in stats.get("engines", []) if isinstance(engine, dict)]

        def total(*path: str) -> float | None:
            return _sum([_at(engine, path) for engine in engines])

        blocks = [_blocks(engine) for engine in engines]
        counters: dict[str, float] = {}
        for engine in engines:
            for name, value in _flat(_get(engine, ("totals", "counters"))).items():
                counters[name] = counters.get(name, 0) + value
        for reason, count in _flat(stats.get("refused")).items():
            counters[f"requests_refused{{{reason}}}"] = count
        return cls(
            _sum([one[0] for one in blocks]),
            _sum([one[1] for one in blocks]),
            total("totals", "levels", "tier_bytes", "hot"),
            total("totals", "levels", "tier_bytes", "cold"),
            total("totals", "levels", "logical_bytes"),
            total("totals", "levels", "logical_tokens"),
            total("totals", "levels", "resident_tokens"),
            total("requests", "running"),
            total("requests", "waiting"),
            total("requests", "compacted"),
            counters,
        )

    @property
    def saved_bytes(self) -> float | None:
        """What the live requests would hold more had nothing been evicted or coded."""
        if self.logical_bytes is None or self.hot_bytes is None or self.cold_bytes is None:
            return None
        return self.logical_bytes - self.hot_bytes - self.cold_bytes


def rates(before: Totals, after: Totals, seconds: float) -> dict[str, float]:
    """Counters' growth a second; one that shrank was started anew and is left out."""
    if seconds <= 0:
        return {}
    grown = {name: value - before.counters.get(name, 0) for name, value in after.counters.items()}
    return {name: growth / seconds for name, growth in grown.items() if growth >= 0}


def _get(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _at(value: Any, path: tuple[str, ...]) -> float | None:
    found = _get(value, path)
    return float(found) if isinstance(found, (int, float)) else None


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _blocks(engine: dict[str, Any]) -> tuple[float | None, float | None]:
    blocks, free, size = (_at(engine, ("pool", name)) for name in ("blocks", "free_blocks", "block_bytes"))
    if blocks is None or size is None:
        return None, None
    return blocks * size, None if free is None else (blocks - free) * size


def _flat(values: Any) -> dict[str, float]:
    """Counters by name; a counter with labels is one entry for each."""
    found: dict[str, float] = {}
    for name, value in (values if isinstance(values, dict) else {}).items():
        if isinstance(value, dict):
            found |= {f"{name}{{{label}}}": float(one) for label, one in value.items()}
        elif isinstance(value, (int, float)):
            found[name] = float(value)
    return found
