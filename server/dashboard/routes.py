# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Routes of the stand-alone dashboard: those of a vLLM server, for each server that is watched.

All of them only read. A server is named by its number, never by an address, so the dashboard can be made to ask no
other than the ones it was started with.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse, StreamingResponse

from deltamem_vllm import __version__
from deltamem_vllm.watching.client import WatchError
from deltamem_vllm.watching.events import encode_event
from deltamem_vllm.watching.watcher import Watcher

KEEP_ALIVE_S = 10.0


class Watched:
    """The watchers of all servers, and whether the application is ending."""

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self.watchers = tuple(watchers)
        self.closing = asyncio.Event()

    async def close(self) -> None:
        """End the streams, so that the process can end while pages are open."""
        self.closing.set()
        for watcher in self.watchers:
            await watcher.wake()

    async def sleep(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the application."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), seconds)

    def servers(self) -> list[dict[str, Any]]:
        """One entry per server: its name and how it is."""
        return [
            {"server": number, "name": one.client.address.name, "url": one.client.address.url, **one.summary()}
            for number, one in enumerate(self.watchers)
        ]


def create_servers_router(watched: Watched) -> APIRouter:
    """Build the router, below `/deltamem/servers`."""
    router = APIRouter(prefix="/deltamem/servers", tags=["deltamem"])

    def find(number: int) -> Watcher | None:
        return watched.watchers[number] if 0 <= number < len(watched.watchers) else None

    async def ask(number: int, question: Awaitable[dict[str, Any]]) -> JSONResponse:
        try:
            return JSONResponse(await question)
        except WatchError as error:
            # The server's 401 is about the dashboard's key for it: the page must not take it for its own.
            status = error.status if error.status in (404, 503) else 502
            return JSONResponse({"reason": error.reason}, status)

    def unknown(number: int) -> JSONResponse:
        last = len(watched.watchers) - 1
        return JSONResponse({"reason": f"no server {number}; there are 0 to {last}"}, 404)

    @router.get("", summary="The servers that are watched")
    async def servers() -> dict[str, Any]:
        return {"version": __version__, "at": time.time(), "servers": watched.servers()}

    @router.get("/{number}/stats")
    async def stats(number: int) -> JSONResponse:
        one = find(number)
        return unknown(number) if one is None else await ask(number, one.client.stats())

    @router.get("/{number}/config")
    async def config(number: int) -> JSONResponse:
        one = find(number)
        return unknown(number) if one is None else await ask(number, one.client.config())

    @router.get("/{number}/requests")
    async def requests(number: int, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> JSONResponse:
        one = find(number)
        return unknown(number) if one is None else await ask(number, one.client.requests(limit))

    # path: an id may have a slash in it, which arrives decoded.
    @router.get("/{number}/requests/{request:path}/layers")
    async def layers(number: int, request: str, engine: Annotated[int, Query(ge=0)] = 0) -> JSONResponse:
        one = find(number)
        return unknown(number) if one is None else await ask(number, one.client.layers(request, engine))

    @router.get("/{number}/stream")
    async def stream(number: int, interval: Annotated[float, Query(ge=0.25, le=60)] = 1.0) -> Any:
        one = find(number)
        if one is None:
            return unknown(number)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_follow(watched, one, interval), media_type="text/event-stream", headers=headers)

    return router


async def _follow(watched: Watched, one: Watcher, interval: float) -> AsyncIterator[str]:
    """The history once, then each new state or error, with how all servers are."""
    if one.history:
        yield encode_event("history", list(one.history))
    seen, due = -1, 0.0
    while not watched.closing.is_set():
        known = await one.changed(seen, KEEP_ALIVE_S)
        yield encode_event("servers", watched.servers())
        if known == seen:
            continue
        # A page that asked for fewer states than the watcher hears gets the newest one, later.
        while (early := due - time.monotonic()) > 0 and not watched.closing.is_set():
            yield ": later\n\n"
            await watched.sleep(min(early, KEEP_ALIVE_S))
        # A little early is in time: otherwise states of every second would miss a page that wants one a second.
        seen, due = one.version, time.monotonic() + 0.8 * interval
        if one.health.status == "live" and one.state is not None:
            yield encode_event("state", one.state)
        elif one.health.status == "down":
            yield encode_event("error", {"reason": one.health.reason, "retry_in_s": one.health.retry_in_s})
