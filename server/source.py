# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the routes read from: the engines behind this API server, and what it refused itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class EnginesUnavailable(RuntimeError):
    """The engines could not be asked; the message says why and reaches the client, with status 503."""


class NotRunning(LookupError):
    """The request that was asked for holds no memory now; the message says why, with status 404."""


class Engines(Protocol):
    """Asks every engine that this API server talks to. Each method raises `EnginesUnavailable` when it cannot."""

    async def stats(self) -> list[dict[str, Any]]:
        """For each engine the fields of `EngineStats`, and ``recent``: events without ``engine``."""
        ...

    async def requests(self, limit: int) -> list[dict[str, Any]]:
        """For each engine the fields of `EngineRequests`, at most ``limit`` rows."""
        ...

    async def state(self, limit: int) -> list[dict[str, Any]]:
        """For each engine both, of the same moment: ``{"stats": ..., "requests": ...}``."""
        ...

    async def layers(self, engine: int, request_id: str) -> dict[str, Any]:
        """The fields of `LayerView`; raises `NotRunning`."""
        ...


class Refusals(Protocol):
    """What this API server refused."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Requests by reason."""
        ...

    def newest_first(self) -> list[dict[str, Any]]:
        """The last ones, as events without ``engine``."""
        ...
