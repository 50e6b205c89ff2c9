# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Who may ask the stand-alone dashboard: a key, or, without one, only pages of this very machine."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from deltamem_vllm.server.auth import ApiKeys

DATA_PATH = "/deltamem/servers"


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware that answers 401 without the key, and 400 to names that are not this machine's.

    The second is against DNS rebinding: any page that the user visits could let its own name point to 127.0.0.1, and
    would then be allowed by the browser to read what is served here. With a key it could not, so then any name is
    fine (a reverse proxy's, for instance).

    Parameters
    ----------
    app : ASGIApp
        What is guarded.
    key : str or None
        Asked for as `Authorization: Bearer KEY` on everything that is data.
    local_only : bool
        Whether the server listens on a loopback address.
    """

    def __init__(self, app: ASGIApp, key: str | None, local_only: bool) -> None:
        self._app = app
        self._keys = None if key is None else ApiKeys([key])
        self._local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on or answer it."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (self._app if refusal is None else refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if self._keys is None:
            name = _host_name(headers.get("host", ""))
            if self._local_only and not is_loopback(name):
                reason = (
                    f"this dashboard has no key and answers only to localhost, but was asked for as {name!r}; open it "
                    "as http://localhost:PORT, or start it with --api-key"
                )
                return JSONResponse({"reason": reason}, 400)
            return None
        if scope["path"].startswith(DATA_PATH) and not self._keys.allows(headers.get("authorization")):
            reason = "the dashboard's key is needed, as 'Authorization: Bearer KEY'"
            return JSONResponse({"reason": reason}, 401, {"WWW-Authenticate": "Bearer"})
        return None


def _host_name(host: str) -> str:
    """The name in a Host header, without the port and the brackets of an IPv6 address."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
