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
from deltamem_vllm.memory.events import RefusalLog
from deltamem_vllm.server.answers import Answers
from deltamem_vllm.server.auth import ApiKeys
from deltamem_vllm.server.routes import create_requests_router, create_router
from deltamem_vllm.server.source import EnginesUnavailable, NotRunning
from deltamem_vllm.telemetry import METRICS, Telemetry

CONFIG = {"mode": "always", "keep_ratio": 0.25, "scorer": "delta"}
ROW = {
    "id": "cmpl-a/b",
    "status": "running",
    "mode": "always",
    "scorer": "delta",
    "dealing": "global",
    "prompt_tokens": 600,
    "logical_tokens": 640,
    "resident_tokens": 160,
    "kept_share": 0.25,
    "hot_bytes": 1 << 20,
    "cold_bytes": 0,
    "cold_tokens": 0.0,
    "blocks": 5,
    "compactions": 1,
    "age_s": 1.5,
}
LAYERS = {"logical_tokens": 640, "layers": 1, "kv_heads": 2, "hot_tokens": [[96.0, 64.0]], "cold_tokens": [[0.0, 9.0]]}


class Engines:
    """Two engines, asked for the ``asked``-th time; ``broken`` is why they do not answer."""

    def __init__(self) -> None:
        self.asked = 0
        self.broken = ""
        self.recent: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
        self.extra: dict[str, Any] = {}

    async def stats(self) -> list[dict[str, Any]]:
        self.asked += 1
        if self.broken:
            raise EnginesUnavailable(self.broken)
        return [self.report(1, 5), self.report(0, self.asked)]

    def report(self, engine: int, compactions: int) -> dict[str, Any]:
        counted = Telemetry()
        counted.count("compactions", compactions)
        counted.count("scoring_us", 250_000)
        counted.observe("kept_share", 1, 4)
        return {
            "engine": engine,
            "active": True,
            "totals": counted.totals(),
            "pool": {"blocks": 40, "free_blocks": 31, "block_tokens": 32, "block_bytes": 1 << 20},
            "requests": {"running": 3, "waiting": 1, "compacted": 2},
            "recent": self.recent[engine],
            **self.extra,
        }

    async def requests(self, limit: int) -> list[dict[str, Any]]:
        return [{"engine": engine, "total": 2, "requests": [ROW, ROW][:limit]} for engine in (1, 0)]

    async def state(self, limit: int) -> list[dict[str, Any]]:
        pairs = zip(await self.stats(), await self.requests(limit), strict=True)
        return [{"stats": stats, "requests": requests} for stats, requests in pairs]

    async def layers(self, engine: int, request_id: str) -> dict[str, Any]:
        if (engine, request_id) != (0, ROW["id"]):
            raise NotRunning(f"request {request_id!r} is not in engine {engine}")
        return {"request": request_id, "engine": engine, **LAYERS}


def _app(engines: Engines, refusals: RefusalLog | None = None, keys: tuple[str, ...] = (), ids: bool = True) -> FastAPI:
    answers = Answers(engines, refusals or RefusalLog(["bad_option"]), "tiny")
    app = FastAPI()
    app.include_router(create_router(answers, CONFIG, ApiKeys(keys), ids=ids))
    app.include_router(create_requests_router(answers, ApiKeys(keys), closing=lambda: False))
    return app


def _get(app: FastAPI, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


def test_stats_come_fresh_from_every_engine() -> None:
    engines = Engines()
    app = _app(engines)
    assert _get(app, "/deltamem/stats").json()["engines"][0]["totals"]["counters"]["compactions"] == 1
    answer = _get(app, "/deltamem/stats")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["version"], body["model"]) == (__version__, "tiny")
    assert body["uptime_s"] >= 0
    expected = [engines.report(0, 2), engines.report(1, 5)]
    assert body["engines"] == [{key: report[key] for key in report if key != "recent"} for report in expected]


def _event(at: float, kind: str = "compacted") -> dict[str, Any]:
    return {"at": at, "kind": kind, "reason": "budget", "request": "r", "detail": "words"}


def test_events_name_requests_only_to_whoever_may_see_requests() -> None:
    engines = Engines()
    engines.recent = {0: [_event(1.0)], 1: []}

    def named(app: FastAPI, key: str | None) -> str | None:
        headers = None if key is None else {"Authorization": f"Bearer {key}"}
        (event,) = _get(app, "/deltamem/stats", headers).json()["recent"]
        assert event["detail"] == "words"
        return event["request"]

    keyed, hidden = _app(engines, keys=("secret",)), _app(engines, ids=False)
    assert named(_app(engines), None) == named(keyed, "secret") == "r"
    assert named(keyed, None) is named(keyed, "wrong") is named(hidden, None) is None


def test_recent_events_of_engines_and_refusals_are_one_list_newest_first() -> None:
    engines, refusals = Engines(), RefusalLog(["bad_option", "does_not_fit"])
    refusals.add("bad_option", "deltamem_keep_ratio")
    engines.recent = {0: [_event(3.0), _event(1.0)], 1: [_event(2.0, "skipped")]}
    body = _get(_app(engines, refusals), "/deltamem/stats").json()
    assert body["refused"] == {"bad_option": 1, "does_not_fit": 0}
    first, *others = body["recent"]
    assert (first["engine"], first["kind"], first["reason"], first["request"]) == (None, "refused", "bad_option", None)
    assert first["detail"] == "deltamem_keep_ratio"
    assert [(event["at"], event["engine"]) for event in others] == [(3.0, 0), (2.0, 1), (1.0, 0)]


def test_many_compactions_leave_other_events_in_the_list() -> None:
    engines = Engines()
    engines.recent = {0: [_event(100.0 + i) for i in range(40)] + [_event(1.0, "preempted")], 1: [_event(300.0)] * 40}
    recent = _get(_app(engines), "/deltamem/stats").json()["recent"]
    assert len(recent) <= 50
    assert recent[-1]["kind"] == "preempted"


def test_unreachable_engine_is_503_with_the_reason() -> None:
    engines = Engines()
    engines.broken = "EngineDeadError: the engine stopped"
    answer = _get(_app(engines), "/deltamem/stats")
    assert answer.status_code == 503
    assert answer.json() == {"reason": "EngineDeadError: the engine stopped"}


def test_a_report_that_is_not_in_the_schema_is_an_error() -> None:
    """Fields would otherwise vanish without a word."""
    engines = Engines()
    engines.extra = {"surprise": 1}
    with pytest.raises(ValidationError, match="surprise"):
        _get(_app(engines), "/deltamem/stats")


def test_config_is_shown_as_resolved_without_asking_the_engine() -> None:
    engines = Engines()
    answer = _get(_app(engines), "/deltamem/config")
    assert answer.json() == {"policy": "deltamem", "version": __version__, "config": CONFIG}
    assert engines.asked == 0


def test_requests_are_listed_by_engine_up_to_the_limit() -> None:
    body = _get(_app(Engines()), "/deltamem/requests?limit=1").json()
    assert body["engines"] == [{"engine": engine, "total": 2, "requests": [ROW]} for engine in (0, 1)]


def test_a_request_whose_id_holds_a_slash_has_layers() -> None:
    for written in ("cmpl-a/b", "cmpl-a%2Fb"):
        answer = _get(_app(Engines()), f"/deltamem/requests/{written}/layers")
        assert answer.json() == {"request": "cmpl-a/b", "engine": 0, **LAYERS}


def test_a_request_that_does_not_run_is_404_with_the_reason() -> None:
    answer = _get(_app(Engines()), "/deltamem/requests/gone/layers?engine=1")
    assert (answer.status_code, answer.json()) == (404, {"reason": "request 'gone' is not in engine 1"})


@pytest.mark.parametrize(
    "query", ["requests?limit=0", "requests?limit=1001", "stream?interval=0.1", "stream?interval=x"]
)
def test_a_parameter_out_of_range_is_422_with_what_was_given(query: str) -> None:
    answer = _get(_app(Engines()), f"/deltamem/{query}")
    name, value = query.partition("?")[2].split("=")
    assert answer.status_code == 422
    assert answer.json()["reason"].startswith(f"{name}: got '{value}': Input should be")


KEYED = ["requests", "requests?limit=0", "requests/cmpl-a/b/layers", "requests/gone/layers", "stream"]


@pytest.mark.parametrize("path", KEYED)
@pytest.mark.parametrize(
    "sent", [None, "Bearer wrong", "Bearer", "Bearer ", "Basic first", "first", "Bearer first second"]
)
def test_without_a_right_key_nothing_is_told_of_requests(path: str, sent: str | None) -> None:
    engines = Engines()
    headers = {} if sent is None else {"Authorization": sent}
    answer = _get(_app(engines, keys=("first", "second")), f"/deltamem/{path}", headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert list(answer.json()) == ["reason"] and "Authorization: Bearer KEY" in answer.json()["reason"]
    assert engines.asked == 0


@pytest.mark.parametrize("sent", ["Bearer first", "bearer second", "Bearer schlüssel"])
def test_any_of_the_keys_opens_the_requests(sent: str) -> None:
    app = _app(Engines(), keys=("first", "second", "schlüssel"))
    # Headers are bytes: a server reads them as latin-1, whatever a client meant.
    headers: Any = {"Authorization": sent.encode("latin-1")}
    assert _get(app, "/deltamem/requests", headers).status_code == 200
    assert _get(app, "/deltamem/requests/gone/layers", headers).status_code == 404


@pytest.mark.parametrize("path", ["stats", "config"])
def test_numbers_without_requests_need_no_key(path: str) -> None:
    assert _get(_app(Engines(), keys=("first",)), f"/deltamem/{path}").status_code == 200


def test_openapi_describes_every_number_and_every_error() -> None:
    document = _app(Engines()).openapi()
    schemas = document["components"]["schemas"]
    by_kind = {"counter": "Counters", "gauge": "Levels", "histogram": "Histograms"}
    for row in METRICS:
        if row.side == "engine":
            assert row.help in schemas[by_kind[row.kind]]["properties"][row.name]["description"]
    assert schemas["Counters"]["properties"]["compaction_seconds"]["type"] == "number"
    assert schemas["Counters"]["properties"]["evicted_tokens"]["type"] == "integer"
    told = {path: set(item["get"]["responses"]) for path, item in document["paths"].items()}
    assert told == {
        "/deltamem/stats": {"200", "503"},
        "/deltamem/config": {"200"},
        "/deltamem/requests": {"200", "401", "422", "503"},
        "/deltamem/requests/{request_id}/layers": {"200", "401", "404", "422", "503"},
        "/deltamem/stream": {"200", "401", "422"},
    }
    assert list(document["paths"]["/deltamem/stream"]["get"]["responses"]["200"]["content"]) == ["text/event-stream"]
    for path, item in document["paths"].items():
        assert ("security" in item["get"]) == (path not in ("/deltamem/stats", "/deltamem/config"))
        for status, response in item["get"]["responses"].items():
            if status != "200":
                (content,) = response["content"].values()
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
