# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem dashboard`: the web dashboard as a process of its own, for any number of servers."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fastapi import FastAPI


def dashboard(
    url: Annotated[
        list[str] | None,
        typer.Option(help="A server to watch, as [NAME=]http://HOST:PORT; again for each further one."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; localhost unless told.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8788,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that readers of the dashboard must give.", envvar="DELTAMEM_DASHBOARD_KEY"),
    ] = None,
    server_key: Annotated[
        list[str] | None,
        typer.Option(
            help="API key of the servers; again for one each, in the order of --url. It never reaches a browser.",
            envvar="DELTAMEM_SERVER_KEY",
        ),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.25, max=60, help="Seconds between two states of a server.")] = 1.0,
) -> None:
    """Serve the web dashboard for the given servers; read-only."""
    from deltamem_vllm.watching.address import AddressError, parse_addresses

    try:
        addresses = parse_addresses(url or [], server_key or [])
    except AddressError as error:
        _say(str(error))
        raise typer.Exit(1) from None
    from deltamem_vllm.server.dashboard.app import create_dashboard_app
    from deltamem_vllm.server.dashboard.guard import is_loopback

    local_only = is_loopback(host)
    if not local_only and not api_key:
        _say(
            f"WARNING: listening on {host} without a key: whoever reaches this port sees the servers' load and the "
            "ids of their requests. Give --api-key (or DELTAMEM_DASHBOARD_KEY), or listen on 127.0.0.1."
        )
    try:
        listener = _listen(host, port)
    except OSError as error:
        _say(f"cannot listen on {host}:{port}: {error.strerror or error}; give another --host or --port")
        raise typer.Exit(1) from None
    app = create_dashboard_app(addresses, key=api_key or None, local_only=local_only, interval=interval)
    shown = f"[{host}]" if ":" in host else host
    _say(f"http://{shown}:{listener.getsockname()[1]}/ watches {', '.join(one.name for one in addresses)}")
    try:
        _serve(app, listener)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _listen(host: str, port: int) -> socket.socket:
    # Here and not by uvicorn, whose answer to a port in use is a line of its log.
    family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _serve(app: FastAPI, listener: socket.socket) -> None:
    import asyncio

    import uvicorn

    class Server(uvicorn.Server):
        """Ends open streams when it is told to end: uvicorn alone would wait for the pages to be closed."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            super().handle_exit(sig, frame)
            asyncio.run_coroutine_threadsafe(app.state.watched.close(), asyncio.get_running_loop())

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False
    )
    Server(config).run(sockets=[listener])


def _say(line: str) -> None:
    typer.echo(f"deltamem dashboard: {line}", err=True)
