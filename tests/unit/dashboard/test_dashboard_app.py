# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The stand-alone dashboard: its routes over real servers, and the command as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI

from deltamem_vllm.server.dashboard.app import create_dashboard_app
from deltamem_vllm.server.dashboard.guard import is_loopback
from deltamem_vllm.watching.address import Address
from tests.support.commands import run_command
from tests.support.watched_server import HOSTILE_ID, MadeUpEngines, made_up_app, on_a_port

CLOSED = "http://127.0.0.1:9"
COMMAND = str(Path(sys.executable).with_name("deltamem"))
UPSTREAM_KEY, OWN_KEY = "upstream-secret", "own-secret"


@contextmanager
def _serve(app: FastAPI) -> Iterator[str]:
    with on_a_port(app) as url:
        yield url


@pytest.fixture(scope="module")
def engines() -> MadeUpEngines:
    return MadeUpEngines(2)


@pytest.fixture(scope="module")
def upstream(engines: MadeUpEngines) -> Iterator[str]:
    with on_a_port(made_up_app(engines, key=UPSTREAM_KEY)) as url:
        yield url


@pytest.fixture(scope="module")
def dashboard(upstream: str) -> Iterator[str]:
    """Watches a live server, one that is not there, and one with a wrong key."""
    addresses = [
        Address("live", upstream, UPSTREAM_KEY),
        Address("gone", CLOSED),
        Address("locked", upstream, "wrong"),
    ]
    with _serve(create_dashboard_app(addresses, interval=0.25)) as url:
        yield url


def _servers(url: str, wanted: dict[str, str]) -> list[dict[str, Any]]:
    """The list of servers once each has the wanted status."""
    for _ in range(100):
        servers = httpx.get(f"{url}/deltamem/servers").json()["servers"]
        if {one["name"]: one["status"] for one in servers} == wanted:
            return list(servers)
        time.sleep(0.1)
    raise AssertionError(servers)


def _events(url: str, count: int, **given: Any) -> list[tuple[str, Any]]:
    found = []
    with httpx.stream("GET", url, timeout=30, **given) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        kind = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((kind, json.loads(line.removeprefix("data: "))))
            if len(found) == count:
                break
    return found


def test_a_dead_server_is_shown_and_does_not_hurt_the_others(dashboard: str) -> None:
    live, gone, locked = _servers(dashboard, {"live": "live", "gone": "down", "locked": "down"})
    assert live["model"] == "made-up" and live["running"] == 6 and live["used_bytes"] > 0
    assert "cannot be reached" in gone["reason"] and gone["heard"] is None
    assert "refused the key" in locked["reason"]


def test_a_stream_begins_with_the_past_and_carries_the_servers_own_answer(dashboard: str) -> None:
    _servers(dashboard, {"live": "live", "gone": "down", "locked": "down"})
    events = _events(f"{dashboard}/deltamem/servers/0/stream?interval=0.25", 7)
    assert [kind for kind, _ in events[:3]] == ["history", "servers", "state"]
    assert events[0][1][0]["stats"]["engines"][1]["totals"]["levels"]["logical_tokens"] == 5200
    state = events[2][1]
    assert state["requests"]["engines"][0]["requests"][1]["id"] == HOSTILE_ID
    assert [kind for kind, _ in events].count("state") >= 2
    assert events[-1][1] if events[-1][0] == "servers" else events[-2][1]


def test_the_stream_of_a_dead_server_says_why(dashboard: str) -> None:
    _servers(dashboard, {"live": "live", "gone": "down", "locked": "down"})
    events = dict(_events(f"{dashboard}/deltamem/servers/1/stream", 2))
    assert "cannot be reached" in events["error"]["reason"]
    assert [one["name"] for one in events["servers"]] == ["live", "gone", "locked"]


def test_questions_are_passed_on_and_errors_are_told_apart(dashboard: str, engines: MadeUpEngines) -> None:
    def get(path: str) -> httpx.Response:
        return httpx.get(f"{dashboard}/deltamem/servers/{path}")

    assert get("0/stats").json()["engines"][1]["engine"] == 1
    assert get("0/config").json()["config"]["keep_ratio"] == 0.25
    assert len(get("0/requests?limit=2").json()["engines"][0]["requests"]) == 2
    layers = get(f"0/requests/{quote(HOSTILE_ID, safe='')}/layers?engine=1")
    assert layers.status_code == 200, layers.text
    assert layers.json()["request"] == HOSTILE_ID and engines.asked_layers[-1] == (1, HOSTILE_ID)
    assert get("0/requests/gone/layers").status_code == 404
    # The reader's own key is not what is wrong here: no 401.
    assert get("2/requests").status_code == 502
    assert get("1/stats").status_code == 502


@pytest.mark.parametrize("path", ["3/stats", "-1/stats", "99/stream", "3/requests/x/layers"])
def test_only_configured_servers_can_be_asked(dashboard: str, path: str) -> None:
    answer = httpx.get(f"{dashboard}/deltamem/servers/{path}")
    assert answer.status_code == 404
    assert "there are 0 to 2" in answer.json()["reason"]


def test_a_number_is_a_number_and_nothing_can_be_changed(dashboard: str) -> None:
    assert httpx.get(f"{dashboard}/deltamem/servers/http%3A%2F%2Fexample.com/stats").status_code in (404, 422)
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert httpx.request(method, f"{dashboard}/deltamem/servers").status_code == 405


def test_the_servers_key_reaches_no_reader(dashboard: str) -> None:
    _servers(dashboard, {"live": "live", "gone": "down", "locked": "down"})
    said = [httpx.get(f"{dashboard}/deltamem/{path}").text for path in ("dashboard", "servers", "servers/0/config")]
    said += [str(_events(f"{dashboard}/deltamem/servers/{number}/stream", 2)) for number in (0, 2)]
    said += [httpx.get(f"{dashboard}/deltamem/servers/2/requests").text]
    assert not [text for text in said if UPSTREAM_KEY in text or "wrong" in text]


def test_the_page_knows_that_there_are_several(dashboard: str) -> None:
    answer = httpx.get(dashboard, follow_redirects=True)
    assert answer.url.path == "/deltamem/dashboard"
    assert 'data-watching="yes"' in answer.text
    assert httpx.get(f"{dashboard}/health").status_code == 200


def test_without_a_key_only_this_machines_names_are_answered(dashboard: str) -> None:
    """A page whose name was made to point to 127.0.0.1 must not read what is served there."""
    path = f"{dashboard}/deltamem/servers"
    rebound = httpx.get(path, headers={"Host": "evil.example:8788"})
    assert rebound.status_code == 400 and "--api-key" in rebound.json()["reason"]
    for name in ("localhost:8788", "127.0.0.1", "[::1]:8788"):
        assert httpx.get(path, headers={"Host": name}).status_code == 200


def test_with_a_key_the_data_needs_it_and_the_page_does_not(upstream: str) -> None:
    app = create_dashboard_app([Address("live", upstream, UPSTREAM_KEY)], key=OWN_KEY, local_only=False)
    with _serve(app) as url:
        for path in ("servers", "servers/0/stats", "servers/0/stream", "servers/0/requests/x/layers"):
            for given in (None, "Bearer wrong", f"Bearer {UPSTREAM_KEY}", OWN_KEY, "Bearer"):
                headers = {} if given is None else {"Authorization": given}
                answer = httpx.get(f"{url}/deltamem/{path}", headers=headers)
                assert answer.status_code == 401, (path, given)
                assert "key is needed" in answer.json()["reason"]
        right = {"Authorization": f"Bearer {OWN_KEY}"}
        assert httpx.get(f"{url}/deltamem/servers", headers=right).status_code == 200
        # Names of a reverse proxy are fine: a page that rebinds its name does not have the key.
        assert httpx.get(f"{url}/deltamem/dashboard", headers={"Host": "dashboards.example"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("gpu", False)],
)
def test_what_counts_as_this_machine(host: str, local: bool) -> None:
    assert is_loopback(host) is local


@contextmanager
def _command(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """`deltamem dashboard` on a free port: the process, its URL and what it had said by then."""
    process = subprocess.Popen(
        [COMMAND, "dashboard", "--port", "0", *arguments], stderr=subprocess.PIPE, text=True, env=os.environ | variables
    )
    said: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"http://\S+:(\d+)/ watches", line):
                break
        else:
            raise AssertionError(f"it ended: {said}")
        yield process, f"http://127.0.0.1:{found[1]}", said
    finally:
        process.kill()
        process.wait()


def _wait_until_it_answers(url: str) -> None:
    for _ in range(100):
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("it does not answer")


def test_the_command_serves_and_ctrl_c_ends_it_while_a_page_is_open(upstream: str) -> None:
    with _command("--url", f"gpu-1={upstream}", "--server-key", UPSTREAM_KEY) as (process, url, said):
        assert "WARNING" not in "".join(said) and "watches gpu-1" in said[-1]
        _wait_until_it_answers(url)
        with httpx.stream("GET", f"{url}/deltamem/servers/0/stream", timeout=30) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("event: ")
            process.send_signal(signal.SIGINT)
            for _ in lines:  # ends, instead of holding the process up
                pass
        assert process.wait(timeout=20) == 130
        assert process.stderr is not None and process.stderr.read() == ""


def test_the_command_warns_when_others_can_read_and_takes_keys_from_the_environment() -> None:
    with _command("--url", CLOSED, "--host", "0.0.0.0") as (_, _, said):
        assert "WARNING: listening on 0.0.0.0 without a key" in "".join(said)
    with _command("--url", CLOSED, "--host", "0.0.0.0", DELTAMEM_DASHBOARD_KEY=OWN_KEY) as (_, url, said):
        assert "WARNING" not in "".join(said)
        _wait_until_it_answers(url)
        assert httpx.get(f"{url}/deltamem/servers").status_code == 401


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "--url: none was given"),
        (["--url", "gpu-1:8000"], "no address of a server"),
        (["--url", CLOSED, "--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
    ],
)
def test_the_command_says_what_is_wrong_and_exits_with_1(arguments: list[str], why: str) -> None:
    done = run_command([COMMAND, "dashboard", *arguments])
    assert done.returncode == 1
    assert why in done.stderr and "Traceback" not in done.stderr


def test_the_command_says_when_its_port_is_taken(upstream: str) -> None:
    port = upstream.rpartition(":")[2]
    command = [COMMAND, "dashboard", "--url", CLOSED, "--port", port]
    done = run_command(command)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr and "another --host or --port" in done.stderr
