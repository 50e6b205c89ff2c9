# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""From what the engines report to what the routes answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from deltamem_vllm import __version__
from deltamem_vllm.memory.events import merged
from deltamem_vllm.server.schemas import EngineRequests, EngineStats, Event, LayerView, RequestList, State, Stats
from deltamem_vllm.server.source import Engines, Refusals


class Answers:
    """Asks, and puts together.

    Parameters
    ----------
    engines: who is asked.
    refusals: of this API server.
    model: name of the served model.
    """

    def __init__(self, engines: Engines, refusals: Refusals, model: str) -> None:
        self._engines = engines
        self._refusals = refusals
        self._model = model
        self._started = time.monotonic()

    async def stats(self) -> Stats:
        """Ask every engine for its counters and levels."""
        return self._stats(await self._engines.stats())

    async def requests(self, limit: int) -> RequestList:
        """Ask every engine for its largest requests."""
        return self._requests(await self._engines.requests(limit))

    async def state(self, limit: int) -> State:
        """Ask every engine for both at once, so that the rows add up to the levels."""
        reports = await self._engines.state(limit)
        return State(
            at=time.time(),
            stats=self._stats(report["stats"] for report in reports),
            requests=self._requests(report["requests"] for report in reports),
        )

    async def layers(self, engine: int, request_id: str) -> LayerView:
        """Ask one engine what each layer and head of a request holds."""
        return LayerView.model_validate(await self._engines.layers(engine, request_id))

    def _stats(self, reports: Iterable[Mapping[str, Any]]) -> Stats:
        engines, events = [], [[{**event, "engine": None} for event in self._refusals.newest_first()]]
        for report in reports:
            numbers = dict(report)
            engine = EngineStats.model_validate({key: value for key, value in numbers.items() if key != "recent"})
            engines.append(engine)
            events.append([{**event, "engine": numbers["engine"]} for event in numbers["recent"]])
        return Stats(
            version=__version__,
            model=self._model,
            uptime_s=time.monotonic() - self._started,
            engines=sorted(engines, key=lambda one: one.engine),
            refused=dict(self._refusals.counts),
            recent=[Event.model_validate(event) for event in merged(events)],
        )

    def _requests(self, reports: Iterable[Mapping[str, Any]]) -> RequestList:
        engines = [EngineRequests.model_validate(report) for report in reports]
        return RequestList(version=__version__, model=self._model, engines=sorted(engines, key=lambda one: one.engine))
