# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The client and the watcher against a server on a real port."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, RedirectResponse, StreamingResponse

from deltamem_vllm.watching import watcher as watching
from deltamem_vllm.watching.address import Address
from deltamem_vllm.watching.client import ServerClient, WatchError
from deltamem_vllm.watching.watcher import Watcher
from tests.support.watched_server import HOSTILE_ID, KV_HEADS, LAYERS, MadeUpEngines, made_up_app, on_a_port

CLOSED = "http://127.0.0.1:9"
Question = Callable[[ServerClient], Any]


def _ask(url: str, question: Question, key: str | None = None) -> Any:
    async def ask() -> Any:
        async with ServerClient(Address("one", url, key)) as client:
            return await question(client)

    return asyncio.run(ask())


def _refused(url: str, question: Question = lambda client: client.stats(), key: str | None = None) -> WatchError:
    with pytest.raises(WatchError) as refused:
        _ask(url, question, key)
    return refused.value


def test_routes_are_asked_as_the_server_has_them() -> None:
    engines = MadeUpEngines()
    with on_a_port(made_up_app(engines)) as url:
        assert _ask(url, lambda client: client.stats())["model"] == "made-up"
        assert _ask(url, lambda client: client.config())["config"]["keep_ratio"] == 0.25
        assert _ask(url, lambda client: client.requests(1))["engines"][0]["total"] == 3
        layers = _ask(url, lambda client: client.layers(HOSTILE_ID, 0))
        assert (layers["request"], len(layers["hot_tokens"]), len(layers["cold_tokens"][0])) == (
            HOSTILE_ID,
            LAYERS,
            KV_HEADS,
        )
    assert engines.asked_layers == [(0, HOSTILE_ID)]


def test_every_kind_of_failure_says_what_it_is() -> None:
    engines = MadeUpEngines()
    engines.down = "the engine did not answer within 10 s"
    with on_a_port(made_up_app(engines, key="right")) as url:
        down = _refused(url)
        assert down.status == 503 and "did not answer within 10 s" in down.reason
        assert "asks for its API key (HTTP 401)" in _refused(url, lambda client: client.requests()).reason
        wrong = _refused(url, lambda client: client.requests(), key="wrong")
        assert wrong.status == 401 and "refused the key" in wrong.reason and "wrong" not in wrong.reason
        engines.down = None
        gone = _refused(url, lambda client: client.layers("gone", 0), key="right")
        assert gone.status == 404 and "'gone' is not running" in gone.reason
    with on_a_port(FastAPI()) as url:
        stock = _refused(url)
        assert stock.status == 404 and "--kv-cache-policy deltamem" in stock.reason
    assert "cannot be reached" in _refused(CLOSED).reason


def test_a_server_cannot_send_its_watcher_elsewhere() -> None:
    app, visited = FastAPI(), []

    @app.get("/deltamem/stats")
    async def stats() -> RedirectResponse:
        return RedirectResponse("/elsewhere")

    @app.get("/deltamem/config")
    async def config() -> PlainTextResponse:
        return PlainTextResponse("<html>not ours</html>")

    @app.get("/elsewhere")
    async def elsewhere() -> dict[str, str]:
        visited.append(1)
        return {}

    with on_a_port(app) as url:
        assert _refused(url).status == 307
        assert "not JSON" in _refused(url, lambda client: client.config()).reason
    assert not visited


async def _until(watcher: Watcher, holds: Callable[[], bool]) -> None:
    version = -1
    async with asyncio.timeout(20):
        while not holds():
            version = await watcher.changed(version, 5)


@contextlib.asynccontextmanager
async def _running(url: str) -> Any:
    async with ServerClient(Address("one", url)) as client:
        watcher = Watcher(client, 0.25)
        task = asyncio.create_task(watcher.run())
        try:
            yield watcher
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def test_a_watcher_hears_states_and_says_when_the_engines_stop_and_come_back() -> None:
    engines = MadeUpEngines()

    async def watch(url: str) -> None:
        async with _running(url) as watcher:
            await _until(watcher, lambda: len(watcher.history) >= 2)
            assert watcher.health.status == "live" and watcher.state is not None
            assert watcher.history[0]["stats"]["engines"][0]["totals"]["counters"] == {}
            engines.down = "engine 0 is dead"
            await _until(watcher, lambda: watcher.health.status == "down")
            assert watcher.health.reason == "engine 0 is dead" and watcher.health.retry_in_s is None
            assert watcher.state is not None
            engines.down = None
            await _until(watcher, lambda: watcher.health.status == "live")
            summary = watcher.summary()
            assert (summary["model"], summary["running"], summary["reason"]) == ("made-up", 3, None)

    with on_a_port(made_up_app(engines)) as url:
        asyncio.run(watch(url))


def test_pauses_grow_while_a_server_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "FIRST_WAIT_S", 0.02)
    pauses: list[float] = []

    async def watch() -> None:
        async with _running(CLOSED) as watcher:
            version = -1
            async with asyncio.timeout(20):
                while len(pauses) < 4:
                    version = await watcher.changed(version, 5)
                    if watcher.health.retry_in_s is not None:
                        pauses.append(watcher.health.retry_in_s)
            assert watcher.health.status == "down" and "cannot be reached" in str(watcher.health.reason)

    asyncio.run(watch())
    # Each is twice the one before, spread by a fifth.
    assert pauses[0] < pauses[2] < pauses[3] and pauses[3] > 4 * pauses[0]


def test_a_stream_of_something_else_is_down_and_not_believed() -> None:
    app = FastAPI()

    @app.get("/deltamem/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(iter(["event: state\ndata: {}\n\n"]), media_type="text/event-stream")

    async def watch(url: str) -> None:
        async with _running(url) as watcher:
            await _until(watcher, lambda: watcher.health.status == "down")
            assert "a state without stats" in str(watcher.health.reason)
            assert watcher.state is None

    with on_a_port(app) as url:
        asyncio.run(watch(url))
