# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The dashboard's page and its files, as a router that any FastAPI app can include.

They hold no data, so they need no key: what is shown comes from the JSON routes, which ask for one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response

from deltamem_vllm import __version__

HERE = Path(__file__).parent

# Everything from this server and nothing inline: text of a request id can then never run, whatever else goes wrong.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked again each time, answered 304: a new version of the server is a new page at once.
    "Cache-Control": "no-cache",
}
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def create_pages_router(*, watching: bool = False) -> APIRouter:
    """Build the router: `GET /deltamem/dashboard` and `GET /deltamem/dashboard/assets/{name}`.

    Parameters
    ----------
    watching : bool
        False inside a vLLM server, where the page asks the routes beside it (`/deltamem/stream`). True in the
        stand-alone application, where there are several servers (`/deltamem/servers/{n}/stream`).

    Raises
    ------
    RuntimeError
        The page's files are missing: the package was installed without its data.
    """
    page, assets = _page(watching), _assets()
    router = APIRouter(prefix="/deltamem", include_in_schema=False)

    @router.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        return _answer(page, request)

    @router.get("/dashboard/assets/{name}")
    async def asset(name: str, request: Request) -> Response:
        # A name is looked up, never joined to a path.
        found = assets.get(name)
        if found is None:
            return Response(f"no asset {name!r}; there are: {', '.join(sorted(assets))}\n", 404, HEADERS, "text/plain")
        return _answer(found, request)

    return router


def _answer(file: _File, request: Request) -> Response:
    headers = {**HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, 200, headers, file.media_type)


def _page(watching: bool) -> _File:
    text = _read(HERE / "page.html").decode()
    values = {"@WATCHING@": "yes" if watching else "no", "@VERSION@": __version__}
    for mark, value in values.items():
        text = text.replace(mark, value)
    return _file(text.encode(), ".html")


def _assets() -> dict[str, _File]:
    paths = sorted(path for path in (HERE / "assets").glob("*") if path.suffix in TYPES)
    if not paths:
        raise RuntimeError(f"the dashboard's files are not in {HERE / 'assets'}; install deltamem-vllm again")
    return {path.name: _file(_read(path), path.suffix) for path in paths} | {
        "settings.json": _file(json.dumps(_settings()).encode(), ".json")
    }


def _settings() -> dict[str, dict[str, Any]]:
    """Every setting's default and meaning, for the page's list of settings."""
    from deltamem_vllm.config import DeltaMemConfig

    defaults = DeltaMemConfig().model_dump(mode="json")
    return {
        name: {"default": defaults[name], "help": " ".join((field.description or "").split())}
        for name, field in DeltaMemConfig.model_fields.items()
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RuntimeError(
            f"the dashboard's file {path} cannot be read: {error}; install deltamem-vllm again"
        ) from None


def _file(content: bytes, suffix: str) -> _File:
    return _File(content, TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
