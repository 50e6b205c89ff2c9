# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The rules in promtool's hands, and the formulas on numbers that were worked out by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from deltamem_vllm.monitoring import scope
from deltamem_vllm.monitoring.alerts import ALERTS
from deltamem_vllm.monitoring.recording import RECORDING
from deltamem_vllm.monitoring.scope import Scope
from tests.support.promtool import promtool, value

ROOT = Path(__file__).resolve().parents[3]
RULES = ROOT / "docker" / "prometheus"
HERE = Scope("sum", "sum", (), (), "10m")

# One request of 1000 tokens of 10 bytes: 100 in full, 400 in cold pages of 2 bytes a token, 500 gone.
ONE = {
    'deltamem_logical_bytes{engine="0"}': "10000x30",
    'deltamem_logical_tokens{engine="0"}': "1000x30",
    'deltamem_resident_tokens{engine="0"}': "180x30",
    'deltamem_tier_bytes{engine="0", tier="hot"}': "1000x30",
    'deltamem_tier_bytes{engine="0", tier="cold"}': "800x30",
    'deltamem_cold_tokens{engine="0"}': "400x30",
    'deltamem_budget_bytes{engine="0"}': "1500x30",
}
# And an engine with another model that evicts nothing.
TWO = {name.replace('"0"', '"1"'): "0x30" for name in ONE} | {
    'deltamem_logical_bytes{engine="1"}': "600x30",
    'deltamem_logical_tokens{engine="1"}': "20x30",
    'deltamem_resident_tokens{engine="1"}': "20x30",
    'deltamem_tier_bytes{engine="1", tier="hot"}': "600x30",
    'deltamem_budget_bytes{engine="1"}': "600x30",
}


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (scope.saved_bytes(HERE), 8200),
        (scope.saved_by_eviction(HERE), 5000),
        (scope.saved_by_cold(HERE), 3200),
        (scope.capacity_factor(HERE), 5.1),
        (scope.floor_share(HERE), 2100 / 10600),
    ],
    ids=["saved", "by eviction", "by cold", "capacity", "floor"],
)
def test_formula_over_two_engines(formula: str, expected: float, tmp_path: Path) -> None:
    assert value(formula, ONE | TWO, tmp_path, expected=round(expected, 6)) == ""


def test_a_formula_with_another_value_is_noticed(tmp_path: Path) -> None:
    assert "FAILED" in value(scope.saved_bytes(HERE), ONE | TWO, tmp_path, expected=8201)


def test_overhead_of_two_engines_is_their_sum(tmp_path: Path) -> None:
    series = {
        'deltamem_policy_seconds_total{engine="0"}': "0+0.6x30",
        'deltamem_policy_seconds_total{engine="1"}': "0+0.6x30",
        'deltamem_compaction_seconds_total{engine="0"}': "0+3x30",
        'deltamem_compaction_seconds_total{engine="1"}': "0x30",
    }
    assert value(scope.overhead(HERE), series, tmp_path, expected=0.07) == ""


def test_refused_share_counts_what_has_no_engine_once(tmp_path: Path) -> None:
    series = {
        'deltamem_requests_refused_total{model_name="m", reason="bad_option"}': "0+5x30",
        'vllm:request_success_total{model_name="m", engine="0", finished_reason="stop"}': "0+10x30",
        'vllm:request_success_total{model_name="m", engine="1", finished_reason="length"}': "0+5x30",
    }
    assert value(scope.refused_share(HERE), series, tmp_path, expected=0.25) == ""
    by_server = replace(HERE, server_total="sum by (model_name)")
    labels = '{model_name="m"}'
    assert value(scope.refused_share(by_server), series, tmp_path, expected=0.25, labels=labels) == ""


@pytest.mark.parametrize(
    "question",
    [("check", "config", "prometheus.yml"), ("test", "rules", "alert-rules.test.yml")],
    ids=["config and rules", "tests of the rules"],
)
def test_promtool_finds_nothing_wrong(question: tuple[str, ...]) -> None:
    answer = promtool(*question, cwd=RULES)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "SUCCESS" in answer.stdout and "FAILED" not in answer.stdout + answer.stderr


def test_every_alert_has_a_case_in_which_it_fires() -> None:
    tests = yaml.safe_load((RULES / "alert-rules.test.yml").read_text())["tests"]
    asked = [case for test in tests for case in test.get("alert_rule_test", ())]
    assert {case["alertname"] for case in asked if case["exp_alerts"]} == {alert.name for alert in ALERTS}


def test_a_wrong_threshold_is_noticed_by_the_tests_of_the_rules(tmp_path: Path) -> None:
    for file in RULES.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    content = yaml.safe_load((tmp_path / "alert-rules.yml").read_text())
    for rule, alert in zip(content["groups"][0]["rules"], ALERTS, strict=True):
        # The first comparison of each alert now never holds.
        rule["expr"] = alert.expr.replace(f" {alert.conditions[0].bad}", " > 1e9", 1)
    (tmp_path / "alert-rules.yml").write_text(yaml.safe_dump(content))
    answer = promtool("test", "rules", "alert-rules.test.yml", cwd=tmp_path)
    assert answer.returncode == 1
    failed = set(re.findall(r"alertname: (\w+),", answer.stdout + answer.stderr))
    assert failed == {alert.name for alert in ALERTS}


def test_messages_name_only_labels_that_the_alert_has() -> None:
    for alert in ALERTS:
        labels = set(re.findall(r"\$labels\.(\w+)", alert.summary + alert.description))
        assert labels <= set(alert.labels.split(", ")), alert.name


def test_recorded_names_say_level_metric_and_operation() -> None:
    names = [rule.record for rule in RECORDING]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"(engine|server):[a-z_]+:[a-z_0-9]+", name) for name in names)
