# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The ports that a server started from here would take are free."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding

NAME = "ports"
_MOST = 65535


def check_ports(asked: Asked) -> Iterator[Finding]:
    """The port to serve on, and the first of vLLM's own between its processes if VLLM_PORT names one."""
    yield from _one(asked.port, "--port N of `vllm serve`", _is_the_asked_server(asked))
    inner = asked.environment.get("VLLM_PORT")
    if inner is None:
        return
    if not inner.isdigit() or not 0 < int(inner) <= _MOST:
        # Kubernetes sets it to a URL in the pods of a service that is called vllm.
        yield Finding(
            NAME,
            "error",
            f"VLLM_PORT={inner!r} is no port number: vLLM does not start",
            "unset it; in Kubernetes give the service another name than `vllm`, or set enableServiceLinks: false",
        )
        return
    yield from _one(int(inner), "another VLLM_PORT, or unset it", False)


def _one(port: int, other: str, expected: bool) -> Iterator[Finding]:
    with socket.socket() as probe:
        # As servers do: a port whose last connections are still fading is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and expected:
                yield Finding(NAME, "ok", f"port {port} is that of the server which was asked about")
            elif error.errno == errno.EADDRINUSE:
                yield Finding(NAME, "warning", f"port {port} is in use: a server could not start on it", f"use {other}")
            else:
                yield Finding(NAME, "error", f"port {port} cannot be used: {error.strerror}", f"use {other}")
        else:
            yield Finding(NAME, "ok", f"port {port} is free")


def _is_the_asked_server(asked: Asked) -> bool:
    return asked.url is not None and urlsplit(asked.url).port == asked.port
