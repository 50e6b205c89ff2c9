# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A real Prometheus scrapes a real server under load, and every expression that is shipped returns values.

The configuration and the rules are those of docker/prometheus; every second is scraped and evaluated. Panels are asked
for as Grafana does it, over the time of the load, with its variables filled in.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deltamem_vllm.evaluation.live_server import LiveServer, serve
from deltamem_vllm.monitoring.alerts import ALERTS
from deltamem_vllm.monitoring.cardinality import series_per_engine, series_per_server
from deltamem_vllm.monitoring.model import Panel, Query
from deltamem_vllm.monitoring.names import POLICY_INFO, series_names
from deltamem_vllm.monitoring.panels import panels
from deltamem_vllm.monitoring.recording import EVICTIONS, RECORDING
from deltamem_vllm.telemetry import METRICS
from tests.support.prometheus_server import Prometheus, run_prometheus

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "docker" / "prometheus"
CONFIG = {"mode": "pressure", "keep_ratio": 0.25, "min_tokens": 64, "interval": 64}
# 63 blocks of 32 tokens: four requests of 600 and more do not fit.
FLAGS = (
    *("--max-model-len", "1024", "--max-num-seqs", "4", "--max-num-batched-tokens", "256"),
    *("--block-size", "32", "--num-gpu-blocks-override", "64", "--enforce-eager"),
)
NOBODY = "127.0.0.1:1"
"""A target at which nothing listens."""
LEAST_S, MOST_S = 5, 180


@dataclass
class History:
    """What Prometheus has seen of the load, and when that was."""

    prometheus: Prometheus
    server: LiveServer
    start: float
    end: float

    def finite(self, expr: str) -> list[float]:
        return self.prometheus.finite(_filled_in(expr), self.start, self.end)


def _filled_in(expr: str) -> str:
    """Do what Grafana does with its variables when everything is chosen."""
    expr = expr.replace("$__rate_interval", "20s").replace("$__range", "1m")
    return re.sub(r"\$(model_name|instance|engine)\b", ".*", expr)


def _ask(server: LiveServer, seed: int, **xargs: Any) -> int:
    body = {
        "model": "smollm2",
        "prompt": [(7 * position + 131 * seed) % 40000 + 100 for position in range(600)],
        "max_tokens": 48,
        "ignore_eos": True,
        "temperature": 0,
        "vllm_xargs": xargs or None,
    }
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).status_code


def _load(server: LiveServer, enough: Callable[[], bool]) -> None:
    """Ask in waves of four: in mode pressure, then with one in mode always; one bad request and one repeated each."""
    began = time.monotonic()
    with ThreadPoolExecutor(4) as clients:
        for wave in range(1000):
            always = {"deltamem_mode": "always"} if wave % 2 else {}
            seeds = [4 * wave, 4 * wave + 1, 4 * wave + 2, 0]
            answers = [clients.submit(_ask, server, seed, **always) for seed in seeds]
            assert _ask(server, 1, deltamem_keep_ratio=1.5) == 400
            assert [answer.result() for answer in answers] == [200] * 4
            lasted = time.monotonic() - began
            if lasted > MOST_S or (lasted > LEAST_S and enough()):
                return


@pytest.fixture(scope="module")
def history(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    folder = tmp_path_factory.mktemp("live")
    with serve(
        smollm2_path, folder / "server.log", deltamem=CONFIG, flags=FLAGS, environment={"OMP_NUM_THREADS": "1"}
    ) as server:
        target = server.url.removeprefix("http://")
        with run_prometheus(CONFIG_FOLDER, [target, NOBODY], folder) as prometheus:
            start = time.time()

            def enough() -> bool:
                reasons = prometheus.now("sum by (reason) (deltamem_evictions_total)")
                rates = prometheus.now(EVICTIONS)
                return sum(value > 0 for value in reasons.values()) >= 2 and any(rates.values())

            _load(server, enough)
            # One more scrape and evaluation of what was counted last.
            time.sleep(2)
            yield History(prometheus, server, start, time.time())


@pytest.mark.parametrize(
    ("panel", "query"),
    [
        pytest.param(panel, query, id=f"{panel.title}-{number}")
        for panel in panels()
        for number, query in enumerate(panel.queries)
    ],
)
def test_panel_shows_values(history: History, panel: Panel, query: Query) -> None:
    assert history.finite(query.expr), f"{panel.title}: {query.expr}"


def test_an_expression_over_a_metric_that_nobody_exports_has_no_values(history: History) -> None:
    query = panels()[0].queries[0].expr.replace("up{", "upp{")
    assert history.finite(query) == []
    assert history.finite("rate(deltamem_compaction_total[20s])") == []
    assert history.finite("0 * up / 0") == [], "NaN is no value"


@pytest.mark.parametrize("rule", RECORDING, ids=lambda rule: rule.record)
def test_recording_rule_has_recorded_values(history: History, rule: Any) -> None:
    assert history.finite(rule.record)
    assert history.finite(rule.expr)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(condition.value, id=f"{alert.name}-{number}")
        for alert in ALERTS
        for number, condition in enumerate(alert.conditions)
    ],
)
def test_alert_has_a_value_to_judge(history: History, value: str) -> None:
    assert history.finite(value)


def test_prometheus_evaluates_every_rule_without_an_error(history: History) -> None:
    groups = history.prometheus.ask("rules")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert rules.keys() == {rule.record for rule in RECORDING} | {alert.name for alert in ALERTS}
    assert {name: rule.get("lastError") for name, rule in rules.items() if rule["health"] != "ok"} == {}


def test_only_the_server_that_is_not_there_is_called_down(history: History) -> None:
    alerts = history.prometheus.ask("alerts")["alerts"]
    down = [alert["labels"]["instance"] for alert in alerts if alert["labels"]["alertname"] == "DeltaMemServerDown"]
    assert down == [NOBODY]
    assert not [alert for alert in alerts if alert["labels"]["alertname"] == "DeltaMemPolicyOff"]


def test_both_modes_have_evicted_and_the_panels_show_it(history: History) -> None:
    panel = {panel.title: panel for panel in panels()}
    assert max(history.finite(panel["Effective capacity"].queries[0].expr)) > 1.2
    assert max(history.finite(panel["Saved now"].queries[0].expr)) > 0
    reasons = history.prometheus.now("sum by (reason) (deltamem_evictions_total)")
    counted = {dict(labels)["reason"]: value for labels, value in reasons.items()}
    assert counted["budget"] > 0
    assert counted["pressure"] + counted["short"] > 0
    (refused,) = history.prometheus.now('deltamem_requests_refused_total{reason="bad_option"}').values()
    assert refused > 0


def test_saved_bytes_by_tier_are_all_of_the_saved_bytes(history: History) -> None:
    panel = {panel.title: panel for panel in panels()}
    parts = " + ".join(f"({query.expr})" for query in panel["Saved bytes by tier"].queries)
    # A number of tokens is whole where it is published, so a token of rounding is allowed.
    token = "max(deltamem_logical_bytes / (deltamem_logical_tokens > 0))"
    differences = history.finite(f"abs({parts} - ({panel['Saved now'].queries[0].expr})) / {token}")
    assert differences
    assert max(differences) <= 1


def test_every_metric_of_the_table_is_scraped_with_all_its_labels(history: History) -> None:
    for row in METRICS:
        for name in series_names(row):
            found = history.prometheus.now(name)
            values = {dict(labels).get(row.label or "") for labels in found}
            assert found, name
            assert set(row.initial) <= values, name
    assert history.prometheus.now('{__name__=~"deltamem_.*_created"}') == {}


def test_the_number_of_series_is_the_one_in_the_guide(history: History) -> None:
    found = history.prometheus.now('{__name__=~"deltamem_.*"}')
    assert len(found) == series_per_engine() + series_per_server()
    guide = (CONFIG_FOLDER.parents[1] / "docs/guides/monitoring.md").read_text()
    assert f"- {series_per_engine()} for each engine\n- {series_per_server()} for each server\n" in guide


def test_grafanas_variables_have_values(history: History) -> None:
    for label, value in (("model_name", "smollm2"), ("engine", "0"), ("instance", history.server.url[7:])):
        assert history.prometheus.ask(f"label/{label}/values", **{"match[]": POLICY_INFO}) == [value]
