# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Asks one server its routes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from deltamem_vllm.watching.address import Address
from deltamem_vllm.watching.events import StreamError, read_events

CONNECT_S = 5.0
# The server itself gives its engines ten seconds to answer.
ANSWER_S = 15.0
# It sends at least a comment every 15 s.
SILENCE_S = 40.0
_MAX_REASON = 400


class WatchError(RuntimeError):
    """A server could not be asked.

    Parameters
    ----------
    reason : str
        Why, for people.
    status : int or None
        HTTP status if there was an answer.
    """

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


class ServerClient:
    """The routes of one server; an async context manager.

    Only the configured address is asked: redirects are errors, so a server cannot send its watcher elsewhere.

    Parameters
    ----------
    address : Address
        Which server, and its key.
    transport : httpx.AsyncBaseTransport or None
        Another way to reach it, for tests.
    """

    def __init__(self, address: Address, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.address = address
        headers = {"Accept": "application/json, text/event-stream"}
        if address.key is not None:
            headers["Authorization"] = f"Bearer {address.key}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            follow_redirects=False,
            transport=transport,
        )

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def stats(self) -> dict[str, Any]:
        """`GET /deltamem/stats`; all of these raise `WatchError`."""
        return await self._json("stats")

    async def config(self) -> dict[str, Any]:
        """`GET /deltamem/config`."""
        return await self._json("config")

    async def requests(self, limit: int = 100) -> dict[str, Any]:
        """`GET /deltamem/requests`: the `limit` largest of each engine."""
        return await self._json("requests", {"limit": limit})

    async def layers(self, request: str, engine: int) -> dict[str, Any]:
        """`GET /deltamem/requests/{request}/layers`: what it keeps in each layer and kv head."""
        return await self._json(f"requests/{quote(request, safe='')}/layers", {"engine": engine})

    async def stream(self, interval: float) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Follow `GET /deltamem/stream`: `("state", {...})` and `("error", {"reason": ...})` until it ends.

        Raises
        ------
        WatchError
            It cannot be followed, or ended.
        """
        timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S, read=SILENCE_S)
        try:
            async with self._http.stream(
                "GET", self._url("stream"), params={"interval": interval}, timeout=timeout
            ) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    raise self._refused(answer)
                async for event in read_events(answer.aiter_lines()):
                    if event.kind in ("state", "error"):
                        yield event.kind, self._object(event.data)
        except httpx.HTTPError as error:
            raise self._failed(error, SILENCE_S) from error
        except StreamError as error:
            raise WatchError(f"{self.address.url}: {error}") from error
        raise WatchError(f"{self.address.url} ended the stream")

    def _url(self, route: str) -> str:
        return f"{self.address.url}/deltamem/{route}"

    async def _json(self, route: str, params: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = await self._http.get(self._url(route), params=params)
        except httpx.HTTPError as error:
            raise self._failed(error, ANSWER_S) from error
        if answer.status_code != 200:
            raise self._refused(answer)
        return self._object(answer.text)

    def _object(self, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise WatchError(f"{self.address.url} answered with something that is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise WatchError(
                f"{self.address.url} answered with JSON of type {type(found).__name__}, expected an object"
            )
        return found

    def _failed(self, error: httpx.HTTPError, silence_s: float) -> WatchError:
        url = self.address.url
        if isinstance(error, httpx.ConnectTimeout):
            return WatchError(f"{url} cannot be reached: no connection within {CONNECT_S:g} s")
        if isinstance(error, httpx.TimeoutException):
            return WatchError(f"{url} did not answer within {silence_s:g} s")
        if isinstance(error, httpx.ConnectError):
            return WatchError(f"{url} cannot be reached: {error}")
        return WatchError(f"{url}: the connection broke: {error or type(error).__name__}")

    def _refused(self, answer: httpx.Response) -> WatchError:
        """Say what a status other than 200 means here."""
        status, url = answer.status_code, self.address.url
        said = _reason(answer)
        if status in (401, 403):
            given = "refused the key it was given" if self.address.key is not None else "asks for its API key"
            return WatchError(f"{url} {given} (HTTP {status})", status)
        if status == 404 and said is None:
            return WatchError(
                f"{url} has no {answer.request.url.path} (HTTP 404): is it a vLLM server that was started with "
                "--kv-cache-policy deltamem, and not with its dashboard turned off?",
                status,
            )
        return WatchError(f"{url} answered HTTP {status}: {said or 'no reason given'}", status)


def _reason(answer: httpx.Response) -> str | None:
    """The `reason` of an error that our routes answer with, or None."""
    try:
        said = json.loads(answer.text)
    except ValueError:  # some proxy's page
        return None
    reason = said.get("reason") if isinstance(said, dict) else None
    return reason[:_MAX_REASON] if isinstance(reason, str) else None
