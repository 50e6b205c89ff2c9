# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What `deltamem top` knows at one moment: the last answers of a server, and how they differ from those before."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltamem_vllm.watching.client import ServerClient, WatchError
from deltamem_vllm.watching.totals import Totals, rates


@dataclass(frozen=True)
class View:
    """One server at one moment.

    Parameters
    ----------
    name, url : str
        Of the server.
    at : float
        Unix time of the answer.
    stats : mapping
        Answer of `GET /deltamem/stats`.
    requests : mapping or None
        Answer of `GET /deltamem/requests`; None where the server has none, see `note`.
    totals : Totals
        Its numbers over all engines.
    rates : mapping of str to float
        Counters' growth a second since the view before; empty in the first one.
    note : str or None
        Why there are no requests.
    problem : str or None
        Why this view is old: the server did not answer since.
    """

    name: str
    url: str
    at: float
    stats: Mapping[str, Any]
    requests: Mapping[str, Any] | None
    totals: Totals
    rates: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None
    problem: str | None = None

    def rows(self) -> list[tuple[int, Mapping[str, Any]]]:
        """(engine, request) of all engines, largest first."""
        found = [
            (int(engine.get("engine", 0)), row)
            for engine in (self.requests or {}).get("engines", [])
            for row in engine.get("requests", [])
        ]
        return sorted(found, key=lambda one: -(one[1].get("hot_bytes") or 0) - (one[1].get("cold_bytes") or 0))

    def as_json(self) -> dict[str, Any]:
        """For `--json`: the server's own answers, unchanged."""
        return {
            "at": self.at,
            "server": self.url,
            "stats": dict(self.stats),
            "requests": None if self.requests is None else dict(self.requests),
            "rates": dict(self.rates),
            "problem": self.problem or self.note,
        }


async def look(client: ServerClient, before: View | None, limit: int = 200) -> View:
    """Ask a server.

    Raises
    ------
    WatchError
        It cannot be reached, has no deltamem, or wants a key.
    """
    stats = await client.stats()
    requests, note = None, None
    try:
        requests = await client.requests(limit)
    except WatchError as error:
        # A server whose dashboard is turned off still has its numbers; a key that is missing can be given.
        if error.status != 404:
            raise
        note = error.reason
    now, totals = time.time(), Totals.of(stats)
    grown = {} if before is None else rates(before.totals, totals, now - before.at)
    return View(client.address.name, client.address.url, now, stats, requests, totals, grown, note)
