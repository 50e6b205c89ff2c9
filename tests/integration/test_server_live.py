# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A real `vllm serve --kv-cache-policy deltamem`: `/metrics` and the JSON routes show what it evicts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families

from deltamem_vllm.telemetry import METRICS

CONFIG = {
    "mode": "always",
    "keep_ratio": 0.25,
    "min_tokens": 64,
    "recent_tokens": 32,
    "window": 16,
    "interval": 64,
}
START_S = 400  # on a machine that others use too
Series = dict[str, dict[frozenset[tuple[str, str]], float]]


class Server:
    """A running server and the questions the tests ask it."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def get(self, path: str) -> httpx.Response:
        # One connection per question: with several API servers each may be answered by another one.
        return httpx.get(f"{self.url}{path}", timeout=60)

    def complete(self, prompt: list[int], max_tokens: int, **xargs: Any) -> httpx.Response:
        body = {
            "model": "smollm2",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "vllm_xargs": xargs or None,
        }
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def series(self) -> Series:
        """Our series by name and by labels, without the two labels that all of them share."""
        found: Series = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name.startswith("deltamem_") and not sample.name.endswith("_created"):
                    labels = dict(sample.labels)
                    assert labels.pop("model_name") == "smollm2"
                    assert labels.pop("engine", "0") == "0"
                    found.setdefault(sample.name, {})[frozenset(labels.items())] = sample.value
        return found

    def engine(self) -> dict[str, Any]:
        """The only engine's entry in /deltamem/stats."""
        answer = self.get("/deltamem/stats")
        assert answer.status_code == 200, answer.text
        (engine,) = answer.json()["engines"]
        assert isinstance(engine, dict)
        return engine


@contextmanager
def _serve(model: str, tmp_path: Path, *flags: str, **variables: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", model, "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "1024", "--max-num-seqs", "4", "--max-num-batched-tokens", "256"),
        *("--block-size", "32", "--num-gpu-blocks-override", "64", "--enforce-eager"),
        *flags,
    ]
    # VLLM_PLUGINS unset: the routes must not depend on it.
    env = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", **variables}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=tmp_path, start_new_session=True
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log)
        _wait_until_ready(server, process)
        yield server
    finally:
        # The whole session: engine and API servers are processes of their own.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if server.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    tail = server.log.read_text(errors="replace")[-6000:]
    raise AssertionError(f"server did not start (exit status {process.poll()}):\n{tail}")


def _with_policy() -> list[str]:
    return ["--kv-cache-policy", "deltamem", "--deltamem-config", json.dumps(CONFIG)]


@pytest.fixture(scope="module")
def server(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with _serve(smollm2_path, tmp_path_factory.mktemp("server"), *_with_policy()) as running:
        yield running


def _prompt(seed: int, length: int = 600) -> list[int]:
    return [(7 * position + 131 * seed) % 40000 + 100 for position in range(length)]


def _engine_agrees_with(server: Server, totals: dict[str, Any], series: Series) -> bool:
    """Whether every number of the engine's `totals` is the scraped one."""
    for row in METRICS:
        if row.side != "engine":
            continue
        told = totals["counters" if row.kind == "counter" else "levels"][row.name]
        by_label = told if row.label else {None: told}
        scraped = series[row.public_name]
        expected = {
            frozenset(() if label is None else {(row.label, label)}): pytest.approx(value)
            for label, value in by_label.items()
        }
        if scraped != expected:
            return False
    return True


def _assert_engine_agrees(server: Server) -> dict[str, Any]:
    """Wait for the last step's stats to reach an API server; return the engine's entry."""
    for _ in range(50):
        engine, series = server.engine(), server.series()
        if engine["requests"]["running"] == 0 and _engine_agrees_with(server, engine["totals"], series):
            return engine
        time.sleep(0.2)
    raise AssertionError(f"/metrics and the engine differ:\n{server.series()}\n{server.engine()}")


def test_zeros_and_policy_info_before_the_first_request(server: Server) -> None:
    series = server.series()
    assert {row.public_name for row in METRICS} <= series.keys()
    assert all(value == 0 for name, by in series.items() if name.endswith("_total") for value in by.values())
    ((info, one),) = series["deltamem_policy_info"].items()
    config = server.get("/deltamem/config").json()["config"]
    assert one == 1
    assert dict(info).items() >= {key: str(value) for key, value in config.items()}.items()
    assert config.items() >= CONFIG.items()


def test_routes_are_in_the_servers_openapi(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/deltamem/stats", "/deltamem/config"} <= paths.keys()


def test_metrics_and_json_show_what_was_evicted(server: Server) -> None:
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda seed: server.complete(_prompt(seed), 96), range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3
    engine = _assert_engine_agrees(server)
    counters, levels = engine["totals"]["counters"], engine["totals"]["levels"]
    assert counters["compactions"] >= 3
    assert counters["evicted_tokens"] >= 3 * 600 * 0.7
    assert counters["freed_blocks"] >= 3 * 12
    assert counters["compaction_seconds"] > counters["scoring_seconds"] > 0
    assert levels["resident_tokens"] == levels["logical_tokens"] == levels["tier_bytes"]["hot"] == 0
    assert engine["pool"]["free_blocks"] == engine["pool"]["blocks"] == 63


def test_live_levels_are_below_the_logical_ones(server: Server) -> None:
    seen: list[tuple[int, int]] = []
    with ThreadPoolExecutor(1) as client:
        for attempt in range(10):  # a busy machine may not get to look while the request runs
            answer = client.submit(server.complete, _prompt(11 + attempt), 300)
            while not answer.done():
                levels = server.engine()["totals"]["levels"]
                if levels["compacted_requests"]:
                    seen.append((levels["resident_tokens"], levels["logical_tokens"]))
                time.sleep(0.02)
            assert answer.result().status_code == 200
            if seen:
                break
    assert seen
    assert all(resident < 0.6 * logical for resident, logical in seen)


def test_refused_request_is_a_400_and_counted(server: Server) -> None:
    refused = frozenset({("reason", "bad_option")})
    before = server.series()["deltamem_requests_refused_total"][refused]
    answer = server.complete(_prompt(1), 4, deltamem_keep_ratio=1.5)
    assert answer.status_code == 400
    assert "deltamem_keep_ratio" in answer.text
    assert server.series()["deltamem_requests_refused_total"][refused] == before + 1


def test_scrape_is_clean_and_the_log_has_no_stray_lines(server: Server) -> None:
    assert "KV fetch:" not in server.log.read_text(), "vLLM's logger saw our numbers in its own field"
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package: prometheus)")
    text = server.get("/metrics").text
    ours = "".join(f"{line}\n" for line in text.splitlines() if "deltamem_" in line)
    checked = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.slow
def test_two_api_servers_show_the_same_exact_numbers(smollm2_path: str, tmp_path: Path) -> None:
    values = tmp_path / "values"
    values.mkdir()
    flags = [*_with_policy(), "--api-server-count", "2"]
    with _serve(smollm2_path, tmp_path, *flags, PROMETHEUS_MULTIPROC_DIR=str(values)) as server:
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda seed: server.complete(_prompt(seed, 300), 48), range(8)))
            refused = list(clients.map(lambda _: server.complete(_prompt(0), 4, deltamem_policy="?"), range(8)))
        # The stats of a step go to the first server in it, which may always be the same one while both are
        # busy. A request alone in the engine is heard by the server that took it.
        while len(_processes_that_counted(values)) < 2 and len(answers) < 30:
            answers.append(server.complete(_prompt(len(answers), 300), 4))
        assert len(_processes_that_counted(values)) == 2, "one server heard everything: nothing is proved"
        assert [answer.status_code for answer in answers] == [200] * len(answers)
        assert [answer.status_code for answer in refused] == [400] * 8
        engine = _assert_engine_agrees(server)
        assert engine["totals"]["counters"]["compactions"] >= len(answers)
        # New connections, so both servers answer; each must know the whole.
        expected = server.series()
        assert expected["deltamem_requests_refused_total"][frozenset({("reason", "bad_option")})] == 8
        for _ in range(12):
            assert server.series() == expected
            assert server.engine() == engine


def _processes_that_counted(values: Path) -> list[str]:
    """Files, one per API server, in which a counter of ours has grown."""
    return [
        path.name
        for path in values.glob("counter_*.db")
        if any(
            value > 0 and "deltamem_evicted_tokens" in key
            for key, value, *_ in MmapedDict.read_all_values_from_file(str(path))
        )
    ]


@pytest.mark.slow
def test_without_the_flag_the_server_is_stock(smollm2_path: str, tmp_path: Path) -> None:
    with _serve(smollm2_path, tmp_path) as server:
        assert server.complete(_prompt(0), 4).status_code == 200
        assert not server.series()
        assert server.get("/deltamem/stats").status_code == 404
        assert not [path for path in server.get("/openapi.json").json()["paths"] if "deltamem" in path]
