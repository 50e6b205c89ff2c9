# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem top`: a server's memory and requests, live in the terminal."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.live import Live

    from deltamem_vllm.watching.address import Address
    from deltamem_vllm.watching.view import View

_REDRAW_S = 0.25


def top(
    url: Annotated[str, typer.Option(help="The server, as http://HOST:PORT.")] = "http://127.0.0.1:8000",
    interval: Annotated[float, typer.Option(min=0.25, max=60, help="Seconds between two frames.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit; needs no terminal.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, one line a frame.")] = False,
    api_key: Annotated[
        str | None, typer.Option(help="The server's API key.", envvar=["DELTAMEM_SERVER_KEY", "VLLM_API_KEY"])
    ] = None,
) -> None:
    """Show a server's memory by tier, what is saved, and its requests; Ctrl-C ends it."""
    from rich.console import Console

    from deltamem_vllm.watching.address import AddressError, parse_address
    from deltamem_vllm.watching.client import WatchError

    console = Console()
    try:
        address = parse_address(url, api_key or None)
        if not (once or json_ or console.is_terminal):
            _say("the output is no terminal; add --once for one frame, or --json for a line of JSON a frame")
            raise typer.Exit(1)
        asyncio.run(_once(address, json_) if once else _lines(address, interval) if json_ else _live(address, interval))
    except AddressError as error:
        _say(str(error))
        raise typer.Exit(1) from None
    except WatchError as error:
        hint = "; give it with --api-key" if error.status in (401, 403) else ""
        _say(f"{error.reason}{hint}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


async def _once(address: Address, as_json: bool) -> None:
    from rich.console import Console

    from deltamem_vllm.watching.client import ServerClient
    from deltamem_vllm.watching.frame import Frame
    from deltamem_vllm.watching.view import look

    async with ServerClient(address) as client:
        view = await look(client, None)
    if as_json:
        typer.echo(json.dumps(view.as_json()))
        return
    # Without a terminal (a file, a pipe) rich would take 80 columns.
    console = Console(width=None if Console().is_terminal else 120)
    console.print(Frame(view, whole=True))


async def _lines(address: Address, interval: float) -> None:
    from deltamem_vllm.watching.client import ServerClient, WatchError
    from deltamem_vllm.watching.view import look

    async with ServerClient(address) as client:
        view = await look(client, None)
        while True:
            typer.echo(json.dumps(view.as_json()))
            await asyncio.sleep(interval)
            try:
                view = await look(client, view)
            except WatchError as error:
                view = _stale(view, error.reason)


async def _live(address: Address, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from deltamem_vllm.watching.client import ServerClient, WatchError
    from deltamem_vllm.watching.frame import Frame
    from deltamem_vllm.watching.view import look

    async with ServerClient(address) as client:
        # Before the screen is taken: what is wrong at first is said and ends the command.
        view = await look(client, None)
        # Drawn here and not in a thread of rich's: Ctrl-C then never meets a frame that is half drawn.
        with Live(Frame(view), console=Console(), screen=True, auto_refresh=False) as live:
            while True:
                await _keep_drawn(live, interval)
                try:
                    view = await look(client, view)
                except WatchError as error:
                    view = _stale(view, error.reason)
                live.update(Frame(view), refresh=True)


async def _keep_drawn(live: Live, seconds: float) -> None:
    """Draw the frame that is there every quarter of a second: the terminal may change its size."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, _REDRAW_S))
        live.refresh()


def _stale(view: View, reason: str) -> View:
    return dataclasses.replace(view, problem=reason, rates={})


def _say(line: str) -> None:
    typer.echo(f"deltamem top: {line}", err=True)
