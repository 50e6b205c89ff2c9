# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The JSON routes, as a router that any FastAPI app can include.

Every error is a `Problem`. It is answered here and not raised further: vLLM's exception handlers would shape it as an
error of the OpenAI API.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from deltamem_vllm import __version__
from deltamem_vllm.server.answers import Answers
from deltamem_vllm.server.auth import UNAUTHORIZED, ApiKeys
from deltamem_vllm.server.events import SharedPoll, stream
from deltamem_vllm.server.schemas import ConfigAnswer, LayerView, Problem, RequestList, Stats
from deltamem_vllm.server.source import EnginesUnavailable, NotRunning

STREAMED_REQUESTS = 50
"""Rows of each engine that the stream carries."""

_UNAVAILABLE = {503: {"model": Problem, "description": "The engines could not be asked"}}
_KEYED = {401: {"model": Problem, "description": "The server has an API key and it was not sent"}}
_INVALID = {422: {"model": Problem, "description": "A parameter is not valid"}}
_ABSENT = {404: {"model": Problem, "description": "The request is not running in this engine"}}

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Responses = dict[int | str, dict[str, Any]]


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"


class _Route(APIRoute):
    """Answers our errors as `Problem`."""

    def get_route_handler(self) -> Handler:
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await answer(request)
            except EnginesUnavailable as error:
                return _problem(503, str(error))
            except NotRunning as error:
                return _problem(404, str(error))
            except RequestValidationError as error:
                return _problem(422, "; ".join(_in_words(one) for one in error.errors()))

        return handle


def create_router(answers: Answers, config: Mapping[str, Any], keys: ApiKeys, ids: bool) -> APIRouter:
    """Build the router of the routes that are always there and show no single request's memory.

    Parameters
    ----------
    answers : Answers
        Asks the engines.
    config : mapping
        The resolved config.
    keys : ApiKeys
        Who may see which requests the last events were about.
    ids : bool
        Whether anybody may.
    """
    router = APIRouter(prefix="/deltamem", tags=["deltamem"], route_class=_Route)

    @router.get("/stats", summary="Memory and eviction, now", responses=_responses(_UNAVAILABLE))
    async def stats(request: Request) -> Stats:
        """Ask every engine for its counters and levels; independent of which API server answers.

        Without the server's API key, if it has one, events do not say which request they are about.
        """
        now = await answers.stats()
        # Clients choose ids (X-Request-Id), so they may say whose a request is.
        return now if ids and keys.allows(request.headers.get("authorization")) else now.without_ids()

    @router.get("/config", summary="The active config")
    async def resolved_config() -> ConfigAnswer:
        """Return the config the policy runs with, defaults filled in."""
        return ConfigAnswer(version=__version__, config=dict(config))

    return router


def create_requests_router(answers: Answers, keys: ApiKeys, closing: Callable[[], bool]) -> APIRouter:
    """Build the router of the routes that show single requests.

    Parameters
    ----------
    answers : Answers
        Asks the engines.
    keys : ApiKeys
        Who may ask.
    closing : callable
        Whether the server is shutting down, so that streams must end.
    """

    class _KeyedRoute(_Route):
        def get_route_handler(self) -> Handler:
            answer = super().get_route_handler()

            async def handle(request: Request) -> Response:
                # Before anything else is looked at: without the key, no answer says what exists.
                if not keys.allows(request.headers.get("authorization")):
                    return _problem(401, UNAUTHORIZED, {"WWW-Authenticate": "Bearer"})
                return await answer(request)

            return handle

    router = APIRouter(
        prefix="/deltamem",
        tags=["deltamem"],
        route_class=_KeyedRoute,
        # For the OpenAPI document; the route class does the checking.
        dependencies=[Security(HTTPBearer(auto_error=False, description="The server's API key, if it has one."))],
    )
    poll = SharedPoll(lambda: answers.state(STREAMED_REQUESTS))

    @router.get("/requests", summary="Live requests", responses=_responses(_KEYED, _INVALID, _UNAVAILABLE))
    async def requests(
        limit: Annotated[int, Query(ge=1, le=1000, description="Most rows of each engine.")] = 100,
    ) -> RequestList:
        """List what each live request holds, those with most memory first; never what it says."""
        return await answers.requests(limit)

    @router.get(
        # A client may choose ids (X-Request-Id), and they may hold slashes.
        "/requests/{request_id:path}/layers",
        summary="What each layer and head of a request holds",
        responses=_responses(_KEYED, _ABSENT, _INVALID, _UNAVAILABLE),
    )
    async def layers(
        request_id: Annotated[str, Path(description="As listed by /deltamem/requests.")],
        engine: Annotated[int, Query(ge=0, description="The engine that runs it.")] = 0,
    ) -> LayerView:
        """Ask the engine's workers, between two steps, how many tokens each (layer, kv head) pair holds."""
        return await answers.layers(engine, request_id)

    @router.get(
        "/stream",
        summary="Everything the dashboard shows, as it changes",
        response_class=_EventStream,
        responses=_responses(
            _KEYED,
            _INVALID,
            {200: {"description": "Server-sent events", "content": {"text/event-stream": {"schema": _TEXT}}}},
        ),
    )
    async def stream_states(
        interval: Annotated[float, Query(ge=0.25, le=60, description="Seconds between two events.")] = 1.0,
    ) -> StreamingResponse:
        """Send `event: state` with `{at, stats, requests}`: unix time, and the answers of /deltamem/stats and
        /deltamem/requests with up to 50 rows of each engine, all of the same moment. Or `event: error` with
        `{reason}` when the engines do not answer; it goes on then. Ends when the client leaves.
        """
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return _EventStream(stream(poll, interval, closing), headers=headers)

    return router


_TEXT = {"type": "string"}


def _responses(*groups: Mapping[int, dict[str, Any]]) -> Responses:
    return {status: response for group in groups for status, response in group.items()}


def _problem(status: int, reason: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(Problem(reason=reason).model_dump(), status_code=status, headers=headers)


def _in_words(error: Mapping[str, Any]) -> str:
    return f"{error['loc'][-1]}: got {error['input']!r}: {error['msg']}"
