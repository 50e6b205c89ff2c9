# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem top`: frames of any size, and the command as a process."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from rich.console import Console

from deltamem_vllm.server.answers import Answers
from deltamem_vllm.server.auth import ApiKeys
from deltamem_vllm.server.routes import create_router
from deltamem_vllm.watching.address import Address
from deltamem_vllm.watching.client import ServerClient
from deltamem_vllm.watching.frame import Frame
from deltamem_vllm.watching.view import View, look
from tests.support.commands import run_command
from tests.support.watched_server import CONFIG, MadeUpEngines, MadeUpRefusals, made_up_app, on_a_port

CLOSED = "http://127.0.0.1:9"
COMMAND = str(Path(sys.executable).with_name("deltamem"))


@pytest.fixture(scope="module")
def engines() -> MadeUpEngines:
    return MadeUpEngines()


@pytest.fixture(scope="module")
def server(engines: MadeUpEngines) -> Iterator[str]:
    with on_a_port(made_up_app(engines)) as url:
        yield url


def _look(url: str, before: View | None = None) -> View:
    async def ask() -> View:
        async with ServerClient(Address("gpu-1", url)) as client:
            return await look(client, before)

    return asyncio.run(ask())


def _draw(view: View, width: int, height: int, *, whole: bool = False) -> list[str]:
    console = Console(width=width, height=height, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Frame(view, whole=whole), height=height if not whole else None)
    return console.export_text().splitlines()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_API_KEY"}
    return run_command([COMMAND, "top", *arguments], environment=environment)


def test_a_frame_shows_memory_requests_and_events(server: str) -> None:
    text = "\n".join(_draw(_look(server), 120, 50))
    for words in (
        "made-up at gpu-1",
        "pool 11%",
        "saved 75.8 MiB",
        "running 3   waiting 4",
        "cmpl-large",
        "bad_option",
    ):
        assert words in text, f"{words!r} is not in\n{text}"


def test_rates_come_from_two_looks(server: str, engines: MadeUpEngines) -> None:
    first = _look(server)
    assert first.rates == {}
    engines.compactions += 10
    second = _look(server, dataclasses.replace(first, at=time.time() - 5))
    assert second.rates["compactions"] == pytest.approx(2, rel=0.2)
    assert "compactions 2.0/s" in "\n".join(_draw(dataclasses.replace(second, rates={"compactions": 2.0}), 100, 40))


@pytest.mark.parametrize(("width", "height"), [(200, 60), (120, 40), (80, 24), (60, 20), (40, 16), (30, 10)])
def test_a_frame_fits_its_terminal(server: str, width: int, height: int) -> None:
    lines = _draw(_look(server), width, height)
    assert len(lines) <= height
    assert max(len(line) for line in lines) <= width
    assert "made-up" in lines[0]


def test_many_requests_are_cut_to_the_height_and_counted(server: str) -> None:
    view = _look(server)
    assert view.requests is not None
    (engine,) = view.requests["engines"]
    many = {**engine, "requests": [{**engine["requests"][0], "id": f"cmpl-{n}"} for n in range(90)], "total": 90}
    lines = _draw(dataclasses.replace(view, requests={"engines": [many]}), 100, 30)
    assert len(lines) <= 30
    shown = sum("cmpl-" in line and "running" in line for line in lines)
    assert 3 <= shown < 90 and f"and {90 - shown} more" in "\n".join(lines)


def test_an_old_view_says_so_first(server: str) -> None:
    view = dataclasses.replace(_look(server), at=time.time() - 75, problem="no connection within 5 s")
    assert "NO ANSWER, numbers are 1m 15s old: no connection within 5 s" in _draw(view, 120, 40)[1]


def test_a_hostile_id_is_text_and_cannot_steer_the_terminal(server: str) -> None:
    done = _run("--once", "--url", server)
    assert done.returncode == 0, done.stderr
    assert '<img src=x onerror="document.title=1">' in done.stdout
    assert "\x1b" not in done.stdout


def test_once_as_json_is_the_servers_own_answer(server: str) -> None:
    done = _run("--once", "--json", "--url", server)
    told = json.loads(done.stdout)
    assert told["stats"]["engines"][0]["totals"]["levels"]["logical_tokens"] == 5200
    assert told["requests"]["engines"][0]["total"] == 3
    assert (told["server"], told["problem"], told["rates"]) == (server, None, {})


def test_a_server_without_the_lists_of_requests_still_has_numbers() -> None:
    app = FastAPI()
    app.include_router(
        create_router(Answers(MadeUpEngines(), MadeUpRefusals(), "made-up"), CONFIG, ApiKeys([]), ids=False)
    )
    with on_a_port(app) as url:
        done = _run("--once", "--url", url)
    assert done.returncode == 0, done.stderr
    assert "pool 11%" in done.stdout and "its dashboard turned off" in " ".join(done.stdout.split())


def test_what_cannot_be_watched_is_said_and_exits_with_1(server: str) -> None:
    with on_a_port(FastAPI()) as stock, on_a_port(made_up_app(MadeUpEngines(), key="right")) as locked:
        cases = [
            (CLOSED, [], f"{CLOSED} cannot be reached"),
            (stock, [], "--kv-cache-policy deltamem"),
            (locked, [], "asks for its API key (HTTP 401); give it with --api-key"),
            (locked, ["--api-key", "wrong"], "refused the key"),
            ("gpu-1", [], "no address of a server"),
        ]
        for url, further, why in cases:
            done = _run("--once", "--url", url, *further)
            assert (done.returncode, done.stdout) == (1, ""), url
            assert why in done.stderr and "Traceback" not in done.stderr
        assert _run("--once", "--url", locked, "--api-key", "right").returncode == 0
    live = _run("--url", server)
    assert live.returncode == 1 and "add --once for one frame" in live.stderr


def test_json_lines_go_on_until_ctrl_c_which_is_quiet(server: str) -> None:
    command = [COMMAND, "top", "--json", "--interval", "0.25", "--url", server]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert "compactions" in lines[2]["rates"] and lines[0]["at"] < lines[2]["at"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert process.stderr.read() == ""


def test_the_live_screen_in_a_terminal_ends_quietly_with_ctrl_c() -> None:
    engines = MadeUpEngines()
    main, terminal = pty.openpty()
    with on_a_port(made_up_app(engines)) as url:
        process = subprocess.Popen(
            [COMMAND, "top", "--interval", "0.25", "--url", url],
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
        )
        os.close(terminal)
        shown = _read_until(main, b"cmpl-large")
        engines.down = "engine 0 is dead"
        shown += _read_until(main, b"NO ANSWER")
        process.send_signal(signal.SIGINT)
        shown += _read_until(main, b"\x1b[?1049l")  # the screen that was there before comes back
        assert process.wait(timeout=20) == 130
        assert process.stderr is not None and process.stderr.read() == b""
    os.close(main)
    assert b"Traceback" not in shown, shown[shown.find(b"Traceback") :].decode()


def _read_until(main: int, wanted: bytes) -> bytes:
    found = b""
    while wanted not in found:
        try:
            read = os.read(main, 65536)
        except OSError:  # the other end is closed
            read = b""
        assert read, f"{wanted!r} never came: {found[-2000:]!r}"
        found += read
    return found
