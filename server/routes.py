# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The JSON routes, as a router that any FastAPI app can include."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from deltamem_vllm import __version__
from deltamem_vllm.server.schemas import ConfigAnswer, EngineStats, Stats, Unavailable

Fetch = Callable[[], Awaitable[list[dict[str, Any]]]]


class StatsUnavailable(RuntimeError):
    """The engines could not be asked; the message says why and reaches the client."""


def create_router(fetch: Fetch, config: Mapping[str, Any], model: str) -> APIRouter:
    """Build the router.

    Parameters
    ----------
    fetch : async callable
        Asks every engine; returns one dict per engine in the shape of `EngineStats`. Raises
        `StatsUnavailable` when it cannot.
    config : mapping
        The resolved config.
    model : str
        Name of the served model.
    """
    router = APIRouter(prefix="/deltamem", tags=["deltamem"])

    @router.get(
        "/stats",
        summary="Memory and eviction, now",
        response_model=Stats,
        responses={503: {"model": Unavailable, "description": "The engines could not be asked"}},
    )
    async def stats() -> Stats | JSONResponse:
        """Ask every engine for its counters and levels; independent of which API server answers."""
        try:
            reports = await fetch()
        except StatsUnavailable as error:
            # Answered here, not raised: vLLM's exception handlers would shape it as an OpenAI error.
            return JSONResponse(Unavailable(reason=str(error)).model_dump(), status_code=503)
        engines = [EngineStats.model_validate(report) for report in reports]
        return Stats(version=__version__, model=model, engines=sorted(engines, key=lambda one: one.engine))

    @router.get("/config", summary="The active config")
    async def resolved_config() -> ConfigAnswer:
        """Return the config the policy runs with, defaults filled in."""
        return ConfigAnswer(version=__version__, config=dict(config))

    return router
