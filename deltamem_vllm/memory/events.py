# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The last things that happened to requests, for people who look at a server. Never what a request says."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

Kind = Literal["refused", "skipped", "preempted", "compacted"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SHOWN = 50
"""Most events that are shown at once."""

PER_KIND = SHOWN // len(KINDS)
"""Events of one kind that are remembered: compactions are frequent and would crowd the others out."""


class EventRing:
    """Remembers the last `PER_KIND` events of each kind. Adding costs an append; nothing is formatted until asked."""

    def __init__(self) -> None:
        self._by_kind: dict[Kind, deque[tuple[float, str, str | None, str, tuple[object, ...]]]] = {
            kind: deque(maxlen=PER_KIND) for kind in KINDS
        }

    def add(self, kind: Kind, reason: str, request: str | None, detail: str, *values: object) -> None:
        """Remember an event of now.

        Parameters
        ----------
        kind, reason, request: as in the answer of ``GET /deltamem/stats``.
        detail: in words, with a ``{}`` for each of ``values``. None of them may be text that a client sent.
        """
        self._by_kind[kind].append((time.time(), reason, request, detail, values))

    def newest_first(self) -> list[dict[str, Any]]:
        """What is remembered, as plain values: ``at``, ``kind``, ``reason``, ``request``, ``detail``."""
        found = [
            {"at": at, "kind": kind, "reason": reason, "request": request, "detail": detail.format(*values)}
            for kind, events in self._by_kind.items()
            for at, reason, request, detail, values in reversed(events)
        ]
        return merged([found])


def merged(lists: Iterable[Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Events of several rings as of one: newest first, at most `PER_KIND` of each kind."""
    left = dict.fromkeys(KINDS, PER_KIND)
    chosen = []
    # The sort is stable, so events of the same moment keep the order of their ring.
    for event in sorted((dict(event) for events in lists for event in events), key=lambda event: -event["at"]):
        if left[event["kind"]]:
            left[event["kind"]] -= 1
            chosen.append(event)
    return chosen


class RefusalLog:
    """What one API server refused.

    Parameters
    ----------
    reasons: shown as zero before they were heard of.

    Attributes
    ----------
    counts: requests by reason.
    """

    def __init__(self, reasons: Iterable[str]) -> None:
        self.counts: dict[str, int] = dict.fromkeys(reasons, 0)
        self._events = EventRing()

    def add(self, reason: str, detail: str) -> None:
        """A request was refused; it has no id yet. ``detail`` must hold nothing that a client wrote."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self._events.add("refused", reason, None, "{}", detail)

    def newest_first(self) -> list[dict[str, Any]]:
        """As `EventRing.newest_first`."""
        return self._events.newest_first()
