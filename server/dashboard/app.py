# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The stand-alone dashboard: one application that watches any number of servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.responses import RedirectResponse

from deltamem_vllm.server.dashboard.guard import Guard
from deltamem_vllm.server.dashboard.pages import create_pages_router
from deltamem_vllm.server.dashboard.routes import Watched, create_servers_router
from deltamem_vllm.watching.address import Address
from deltamem_vllm.watching.client import ServerClient
from deltamem_vllm.watching.watcher import Watcher


def create_dashboard_app(
    addresses: Sequence[Address], *, key: str | None = None, local_only: bool = True, interval: float = 1.0
) -> FastAPI:
    """Build the application.

    Parameters
    ----------
    addresses : sequence of Address
        The servers, with their keys; the only ones that are ever asked.
    key : str or None
        What readers must give; None leaves the data open.
    local_only : bool
        Whether it will listen on a loopback address.
    interval : float
        Seconds between two states of a server.
    """
    watched = Watched([Watcher(ServerClient(address), interval) for address in addresses])

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for watcher in watched.watchers:
                await stack.enter_async_context(watcher.client)
            tasks = [asyncio.create_task(watcher.run()) for watcher in watched.watchers]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
        # A watcher never ends by itself: an error in it is a bug, and must be heard of.
        for error in ended:
            if isinstance(error, Exception):
                raise error

    # No documentation pages: FastAPI's load their scripts from elsewhere.
    app = FastAPI(title="deltamem dashboard", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.watched = watched
    app.add_middleware(Guard, key=key, local_only=local_only)
    app.include_router(create_pages_router(watching=True))
    app.include_router(create_servers_router(watched))

    @app.get("/")
    async def root() -> RedirectResponse:
        return RedirectResponse("deltamem/dashboard")

    @app.get("/health")
    async def health() -> Response:
        """Alive; the servers' health is at /deltamem/servers."""
        return Response(status_code=200)

    return app
