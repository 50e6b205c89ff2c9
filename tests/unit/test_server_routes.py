# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The JSON routes on a plain FastAPI app, without vLLM."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from deltamem_vllm import __version__
from deltamem_vllm.server.routes import Fetch, StatsUnavailable, create_router
from deltamem_vllm.telemetry import METRICS, Telemetry

CONFIG = {"mode": "always", "keep_ratio": 0.25, "scorer": "delta"}


def _report(engine: int, compactions: int = 0) -> dict[str, Any]:
    counted = Telemetry()
    counted.count("compactions", compactions)
    counted.count("scoring_us", 250_000)
    return {
        "engine": engine,
        "active": True,
        "totals": counted.totals(),
        "pool": {"blocks": 40, "free_blocks": 31, "block_tokens": 32, "block_bytes": 1 << 20},
        "requests": {"running": 3, "waiting": 1, "compacted": 2},
    }


def _app(fetch: Fetch) -> FastAPI:
    app = FastAPI()
    app.include_router(create_router(fetch, CONFIG, "tiny"))
    return app


def _get(app: FastAPI, path: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path)

    return asyncio.run(ask())


def test_stats_come_fresh_from_every_engine() -> None:
    asked = 0

    async def fetch() -> list[dict[str, Any]]:
        nonlocal asked
        asked += 1
        return [_report(1, compactions=5), _report(0, compactions=asked)]

    app = _app(fetch)
    assert _get(app, "/deltamem/stats").json()["engines"][0]["totals"]["counters"]["compactions"] == 1
    answer = _get(app, "/deltamem/stats")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["version"], body["model"]) == (__version__, "tiny")
    assert body["engines"] == [_report(0, compactions=2), _report(1, compactions=5)]


def test_unreachable_engine_is_503_with_the_reason() -> None:
    async def fetch() -> list[dict[str, Any]]:
        raise StatsUnavailable("EngineDeadError: the engine stopped")

    answer = _get(_app(fetch), "/deltamem/stats")
    assert answer.status_code == 503
    assert answer.json() == {"reason": "EngineDeadError: the engine stopped"}


def test_a_report_that_is_not_in_the_schema_is_an_error() -> None:
    """Fields would otherwise vanish without a word."""

    async def fetch() -> list[dict[str, Any]]:
        return [{**_report(0), "surprise": 1}]

    with pytest.raises(ValidationError, match="surprise"):
        _get(_app(fetch), "/deltamem/stats")


def test_config_is_shown_as_resolved() -> None:
    async def fetch() -> list[dict[str, Any]]:
        raise AssertionError("the config does not need the engine")

    answer = _get(_app(fetch), "/deltamem/config")
    assert answer.json() == {"policy": "deltamem", "version": __version__, "config": CONFIG}


def test_openapi_describes_every_number() -> None:
    async def fetch() -> list[dict[str, Any]]:
        return []

    document = _app(fetch).openapi()
    schemas = document["components"]["schemas"]
    for row in METRICS:
        if row.side == "engine":
            schema = schemas["Counters" if row.kind == "counter" else "Levels"]
            assert row.help in schema["properties"][row.name]["description"]
    assert schemas["Counters"]["properties"]["compaction_seconds"]["type"] == "number"
    assert schemas["Counters"]["properties"]["evicted_tokens"]["type"] == "integer"
    assert set(document["paths"]["/deltamem/stats"]["get"]["responses"]) == {"200", "503"}
