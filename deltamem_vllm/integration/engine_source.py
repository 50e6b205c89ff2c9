# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Asks the engines from an API server, for the JSON routes.

Numbers are asked from the engines at the moment of the request. What an API server has heard itself is only its share:
with several of them each step's stats reach one (see `metrics.py`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from deltamem_vllm.server.source import EnginesUnavailable, NotRunning

# An engine answers between two steps, so this bounds the longest step that a reader waits for.
ENGINE_TIMEOUT_S = 10.0


class EngineSource:
    """The engines behind one API server, as `deltamem_vllm.server.source.Engines`.

    Parameters
    ----------
    engine_client: vLLM's AsyncLLM.
    """

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client

    async def stats(self) -> list[dict[str, Any]]:
        """See `Engines`."""
        return _active(await self._ask("deltamem_stats"))

    async def requests(self, limit: int) -> list[dict[str, Any]]:
        """See `Engines`."""
        return _active(await self._ask("deltamem_requests", limit))

    async def state(self, limit: int) -> list[dict[str, Any]]:
        """See `Engines`."""
        reports = await self._ask("deltamem_state", limit)
        _active([report["stats"] for report in reports])
        return reports

    async def layers(self, engine: int, request_id: str) -> dict[str, Any]:
        """See `Engines`."""
        reports = _active(await self._ask("deltamem_layers", engine, request_id))
        for report in reports:
            if "missing" in report:
                raise NotRunning(report["missing"])
            if len(report) > 1:
                return report
        known = ", ".join(str(number) for number in sorted(report["engine"] for report in reports))
        raise NotRunning(
            f"engine: got {engine}, but this server has {known}; /deltamem/requests says which one runs it"
        )

    async def _ask(self, method: str, *args: Any) -> list[dict[str, Any]]:
        call = self._client.engine_core.call_utility_all_async(method, *args)
        try:
            reports: list[dict[str, Any]] = await asyncio.wait_for(call, ENGINE_TIMEOUT_S)
        except TimeoutError:
            raise EnginesUnavailable(f"the engine did not answer within {ENGINE_TIMEOUT_S:g} s") from None
        except Exception as error:  # vLLM reports a failed utility call as a bare Exception
            raise EnginesUnavailable(f"{type(error).__name__}: {error}") from error
        return reports


def _active(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    off = [report["engine"] for report in reports if not report.get("active", True)]
    if off:
        raise EnginesUnavailable(f"engines {off} run without the deltamem scheduler")
    return reports
