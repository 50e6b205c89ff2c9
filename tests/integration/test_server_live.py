# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A real `vllm serve --kv-cache-policy deltamem`: `/metrics` and the JSON routes show what it evicts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.mmap_dict import MmapedDict

from deltamem_vllm.ops.huge_pages import huge_pages_setting
from deltamem_vllm.telemetry import METRICS
from tests.support.live_vllm import KEY, Series, Server, serve

CONFIG = {
    "mode": "always",
    "keep_ratio": 0.25,
    "min_tokens": 64,
    "recent_tokens": 32,
    "window": 16,
    "interval": 64,
}


def _with_policy() -> list[str]:
    return ["--kv-cache-policy", "deltamem", "--deltamem-config", json.dumps(CONFIG)]


@pytest.fixture(scope="module")
def server(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    keys = ("--api-key", "first-key", KEY)
    with serve(smollm2_path, tmp_path_factory.mktemp("server"), *_with_policy(), *keys) as running:
        yield running


def _prompt(seed: int, length: int = 600) -> list[int]:
    return [(7 * position + 131 * seed) % 40000 + 100 for position in range(length)]


def _engine_agrees_with(server: Server, totals: dict[str, Any], series: Series) -> bool:
    """Whether every number of the engine's `totals` is the scraped one."""
    for row in METRICS:
        if row.side != "engine":
            continue
        if row.kind == "histogram":
            kept = totals["histograms"][row.name]
            found = {dict(labels)["le"]: value for labels, value in series[f"{row.public_name}_bucket"].items()}
            if found != kept["buckets"] or series[f"{row.public_name}_count"] != {frozenset(): kept["count"]}:
                return False
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
    assert {row.public_name for row in METRICS if row.kind != "histogram"} <= series.keys()
    assert all(value == 0 for name, by in series.items() if name.endswith("_total") for value in by.values())
    ((info, one),) = series["deltamem_policy_info"].items()
    config = server.get("/deltamem/config").json()["config"]
    assert one == 1
    assert dict(info).items() >= {key: str(value) for key, value in config.items()}.items()
    assert config.items() >= CONFIG.items()


def test_routes_are_in_the_servers_openapi(server: Server) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    own = {"stats", "config", "requests", "requests/{request_id}/layers", "stream"}
    assert {f"/deltamem/{path}" for path in own} <= paths.keys()


def test_metrics_and_json_show_what_was_evicted(server: Server) -> None:
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda seed: server.complete(_prompt(seed), 96), range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3
    engine = _assert_engine_agrees(server)
    counters, levels = engine["totals"]["counters"], engine["totals"]["levels"]
    kept = engine["totals"]["histograms"]["kept_share"]
    assert counters["compactions"] == kept["count"] == sum(counters["evictions"].values()) >= 3
    assert counters["evictions"]["pressure"] == counters["pressure_blocks"] == 0, "the mode is always"
    assert 0 < kept["sum"] / kept["count"] <= 0.3
    assert counters["compaction_seconds"] > counters["policy_seconds"] > 0
    assert counters["evicted_tokens"] >= 3 * 600 * 0.7
    assert counters["freed_blocks"] >= 3 * 12
    assert counters["compaction_seconds"] > counters["scoring_seconds"] > 0
    assert levels["resident_tokens"] == levels["logical_tokens"] == levels["tier_bytes"]["hot"] == 0
    assert levels["budget_bytes"] == 0
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


def _compacted_rows(server: Server, seed: int) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Engine and rows of states with a compacted request, while two run; the machine may be too busy to see one."""
    for attempt in range(10):
        with ThreadPoolExecutor(2) as clients, server.states(0.25) as states:
            answers = [clients.submit(server.complete, _prompt(seed + 2 * attempt + i), 100) for i in range(2)]
            for state in states:
                (engine,), (listed,) = state["stats"]["engines"], state["requests"]["engines"]
                if any(row["compactions"] for row in listed["requests"]):
                    yield engine, listed["requests"]
                if all(answer.done() for answer in answers):
                    break
            assert [answer.result().status_code for answer in answers] == [200, 200]


def test_rows_of_running_requests_add_up_to_the_levels(server: Server) -> None:
    for seen, (engine, rows) in enumerate(_compacted_rows(server, 50)):
        levels = engine["totals"]["levels"]
        for key in ("logical_tokens", "resident_tokens"):
            assert sum(row[key] for row in rows) == levels[key]
        for tier in ("hot", "cold"):
            assert sum(row[f"{tier}_bytes"] for row in rows) == pytest.approx(levels["tier_bytes"][tier], abs=2)
        assert sum(row["cold_tokens"] for row in rows) == pytest.approx(levels["cold_tokens"], abs=1)
        assert sum(levels["tier_bytes"].values()) == levels["resident_bytes"]
        compacted = sum(row["compactions"] > 0 for row in rows)
        assert compacted == levels["compacted_requests"] == engine["requests"]["compacted"]
        pool = engine["pool"]
        assert sum(row["blocks"] for row in rows) == pool["blocks"] - pool["free_blocks"]
        assert levels["budget_bytes"] <= levels["resident_bytes"]
        held = [row["hot_bytes"] + row["cold_bytes"] for row in rows]
        assert held == sorted(held, reverse=True)
        for row in rows:
            assert (row["mode"], row["dealing"], row["prompt_tokens"]) == ("always", "global", 600)
            if row["logical_tokens"]:
                assert row["kept_share"] == pytest.approx(row["resident_tokens"] / row["logical_tokens"])
        if seen == 3:
            return
    raise AssertionError("no compacted request was seen")


def test_the_heat_map_adds_up_to_the_row(server: Server) -> None:
    """Mean tokens of the pairs, in bytes, are what the row says, whichever pair holds more."""
    for engine, rows in _compacted_rows(server, 80):
        row = next(row for row in rows if row["compactions"])
        answer = server.get(f"/deltamem/requests/{row['id']}/layers")
        if answer.status_code == 404:
            assert row["id"] in answer.json()["reason"]
            continue
        view = answer.json()
        (listed,) = server.get("/deltamem/requests").json()["engines"]
        again = next((one for one in listed["requests"] if one["id"] == row["id"]), None)
        if again is None or again["compactions"] != row["compactions"]:
            continue
        hot, cold = ([tokens for layer in view[f"{tier}_tokens"] for tokens in layer] for tier in ("hot", "cold"))
        assert len(hot) == len(cold) == view["layers"] * view["kv_heads"] == 90
        assert len(set(hot)) > 1, "pages were meant to be dealt unequally"
        token_bytes = engine["pool"]["block_bytes"] / engine["pool"]["block_tokens"]
        # Between the three answers the request went on writing; what was dealt is the same.
        written = view["logical_tokens"] - row["logical_tokens"]
        assert 0 <= written <= again["logical_tokens"] - row["logical_tokens"]
        assert (sum(hot) / 90 - written) * token_bytes == pytest.approx(row["hot_bytes"], abs=2)
        assert sum(cold) / 90 == pytest.approx(row["cold_tokens"])
        return
    raise AssertionError("no compacted request was seen")


def test_a_stream_ends_with_its_client_and_others_go_on(server: Server) -> None:
    with server.states(0.25) as staying:
        with server.states(0.25) as leaving:
            first, second = next(leaving), next(leaving)
            assert second["at"] > first["at"]
        seen = [next(staying)["at"] for _ in range(6)]
    assert seen == sorted(seen) and seen[-1] > second["at"]
    assert server.complete(_prompt(0), 4).status_code == 200
    assert "Traceback" not in server.log.read_text(), "a client that leaves is no error"


def test_requests_are_shown_to_holders_of_a_key_only(server: Server) -> None:
    for path in ("requests", "requests/any/layers", "stream"):
        for key in (None, "third-key"):
            answer = server.get(f"/deltamem/{path}", key=key)
            assert answer.status_code == 401
            assert list(answer.json()) == ["reason"]
    assert server.get("/v1/models", key=None).status_code == 401, "the server was meant to have a key"
    for path in ("deltamem/stats", "deltamem/config", "deltamem/dashboard", "metrics"):
        assert server.get(f"/{path}", key=None).status_code == 200
    assert server.get("/deltamem/requests", key="first-key").status_code == 200
    assert server.get("/deltamem/requests/any/layers").status_code == 404


def test_refused_request_is_a_400_and_counted(server: Server) -> None:
    refused = frozenset({("reason", "bad_option")})
    before = server.series()["deltamem_requests_refused_total"][refused]
    answer = server.complete(_prompt(1), 4, deltamem_keep_ratio=1.5)
    assert answer.status_code == 400
    assert "deltamem_keep_ratio" in answer.text
    assert server.series()["deltamem_requests_refused_total"][refused] == before + 1
    secret = server.complete(_prompt(1), 4, **{"deltamem_my_secret": "another secret"})
    assert secret.status_code == 400
    stats = server.get("/deltamem/stats", key=None)
    assert stats.json()["refused"]["bad_option"] == before + 2
    told = [event for event in stats.json()["recent"] if event["kind"] == "refused"][:2]
    assert [event["detail"] for event in told] == ["an option that is not known", "deltamem_keep_ratio"]
    assert "secret" not in stats.text


def test_scrape_is_clean_and_the_log_has_no_stray_lines(server: Server) -> None:
    log = server.log.read_text()
    assert "KV fetch:" not in log, "vLLM's logger saw our numbers in its own field"
    (had, size), *others = re.findall(r"huge pages hold ([\d.]+) of the KV cache's ([\d.]+) GiB", log)
    assert not others and (float(size) - 0.01 <= float(had) <= float(size) or huge_pages_setting() == "never")
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
    with serve(smollm2_path, tmp_path, *flags, PROMETHEUS_MULTIPROC_DIR=str(values)) as server:
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
    with serve(smollm2_path, tmp_path) as server:
        assert server.complete(_prompt(0), 4).status_code == 200
        assert not server.series()
        assert server.get("/deltamem/stats").status_code == 404
        assert not [path for path in server.get("/openapi.json").json()["paths"] if "deltamem" in path]
