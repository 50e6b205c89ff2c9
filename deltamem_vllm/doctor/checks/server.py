# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A running server: healthy, with the policy, its numbers there, and of this version."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from deltamem_vllm import __version__
from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding

NAME = "server"
_TIMEOUT_S = 15.0


def check_server(asked: Asked) -> Iterator[Finding]:
    """/health, /deltamem/config and /metrics of ``--url``."""
    if asked.url is None:
        return
    root = asked.url.rstrip("/")
    if urlsplit(root).scheme not in ("http", "https") or not urlsplit(root).hostname:
        yield Finding(NAME, "error", f"{root} is no URL of a server", "such as --url http://127.0.0.1:8000")
        return
    try:
        health, _ = _get(f"{root}/health")
    except (OSError, http.client.HTTPException) as error:
        yield Finding(
            NAME,
            "error",
            f"{root} does not answer: {getattr(error, 'reason', None) or error}",
            "start it, wait until it is ready, or correct --url (without /v1)",
        )
        return
    if health == 200:
        yield Finding(NAME, "ok", f"{root} is healthy")
    else:
        yield Finding(
            NAME, "error", f"{root}/health answers {health}", "look at the server's log: its engine may have died"
        )
    yield from _policy(root)
    yield from _metrics(root)


def _policy(root: str) -> Iterator[Finding]:
    status, body = _get(f"{root}/deltamem/config")
    if status == 404:
        yield Finding(
            NAME,
            "error",
            f"{root} has no /deltamem routes: it runs without the policy",
            "start it with --kv-cache-policy deltamem",
        )
        return
    try:
        version = str(json.loads(body)["version"])
    except (ValueError, KeyError, TypeError):
        yield Finding(
            NAME,
            "error",
            f"{root}/deltamem/config answers {status} and no config",
            "look for a proxy in between; it must pass /deltamem on",
        )
        return
    if version == __version__:
        yield Finding(NAME, "ok", f"{root} runs deltamem {version}, as here")
    else:
        yield Finding(
            NAME,
            "warning",
            f"{root} runs deltamem {version}, here it is {__version__}",
            "restart the server after an update, or run the doctor with its installation",
        )


def _metrics(root: str) -> Iterator[Finding]:
    status, body = _get(f"{root}/metrics")
    if status == 200 and "\ndeltamem_" in body:
        yield Finding(NAME, "ok", f"{root}/metrics has deltamem's numbers")
    else:
        yield Finding(
            NAME,
            "error",
            f"{root}/metrics answers {status} and has no deltamem_ numbers",
            "start it with --kv-cache-policy deltamem and without --disable-log-stats",
        )


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            return int(answer.status), answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")
