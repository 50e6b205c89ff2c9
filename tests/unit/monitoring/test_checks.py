# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`scripts/monitoring.py --check`: the repository passes, and every kind of mistake is found."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deltamem_vllm.monitoring import checks, guide
from deltamem_vllm.monitoring.alerts import ALERTS
from deltamem_vllm.monitoring.model import Condition, Query, RecordingRule
from deltamem_vllm.monitoring.panels import queries
from deltamem_vllm.monitoring.recording import RECORDING
from deltamem_vllm.telemetry import METRICS, Metric

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "monitoring.py"
GUIDE = "docs/guides/monitoring.md"
REFERENCE = "docs/reference/metrics.md"
NEW = Metric("novel", "novel", "counter", "Something new.")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the check reads."""
    for folder in ("docker/grafana", "docker/prometheus"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in (GUIDE, REFERENCE):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


@pytest.fixture(scope="module")
def problems() -> Callable[[Path], list[str]]:
    found: Callable[[Path], list[str]] = runpy.run_path(str(SCRIPT))["problems"]
    return found


def test_the_repository_passes_the_check() -> None:
    checked = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=120)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "path",
    [
        "docker/grafana/dashboards/deltamem.json",
        "docker/grafana/provisioning/dashboards/deltamem.yaml",
        "docker/grafana/provisioning/datasources/prometheus.yaml",
        "docker/prometheus/prometheus.yml",
        "docker/prometheus/recording-rules.yml",
        "docker/prometheus/alert-rules.yml",
    ],
)
def test_a_changed_and_a_missing_file_are_found(copy: Path, problems: Callable[[Path], list[str]], path: str) -> None:
    assert problems(copy) == []
    file = copy / path
    file.write_text(file.read_text().replace("deltamem", "deltamen", 1))
    assert problems(copy) == [f"{path} is stale; run scripts/monitoring.py"]
    file.unlink()
    assert problems(copy) == [f"{path} is missing; run scripts/monitoring.py"]


def test_a_changed_table_of_the_guide_is_found_and_a_changed_text_is_not(
    copy: Path, problems: Callable[[Path], list[str]]
) -> None:
    page = copy / GUIDE
    text = page.read_text()
    page.write_text(text.replace("## Set up", "## How to set up"))
    assert problems(copy) == []
    page.write_text(text.replace("| **Tokens a second** |", "| **Tokens per second** |"))
    assert problems(copy) == [f"{GUIDE} is stale; run scripts/monitoring.py"]


def test_lost_marks_of_a_generated_part_are_an_error(copy: Path, problems: Callable[[Path], list[str]]) -> None:
    page = copy / GUIDE
    page.write_text(page.read_text().replace("<!-- generated: alerts", "<!-- generated: alarms"))
    with pytest.raises(ValueError, match="marks of generated parts: .*alarms.*; needed: .*alerts"):
        problems(copy)


def test_undefined_metrics_are_found_in_panels_rules_and_alerts() -> None:
    assert checks.undefined(queries(), RECORDING, ALERTS, METRICS) == []
    wrong = "sum(rate(deltamem_compaction_total[5m]))"
    alert = replace(ALERTS[0], conditions=(Condition(wrong, "> 0"),))
    found = checks.undefined([Query(wrong, "")], [RecordingRule("a:b:c", wrong)], [alert], METRICS)
    assert [problem.split(" uses ")[0] for problem in found] == [
        f"a panel's query {wrong!r}",
        "recording rule a:b:c",
        f"alert {alert.name}",
    ]
    assert all("deltamem_compaction_total, which is neither in telemetry.METRICS nor" in problem for problem in found)


def test_a_metric_taken_out_of_the_table_is_found_where_it_is_used() -> None:
    fewer = [row for row in METRICS if row.key != "kept_share"]
    found = checks.undefined(queries(), RECORDING, ALERTS, fewer)
    assert len(found) >= 3
    assert all("deltamem_kept_share_bucket" in problem for problem in found)


def test_recorded_series_are_for_alerts_and_not_for_panels() -> None:
    (name, *_) = (rule.record for rule in RECORDING)
    assert checks.undefined([Query(name, "")], RECORDING, [], METRICS)
    assert not checks.undefined([], RECORDING, [replace(ALERTS[0], conditions=(Condition(name, "> 0"),))], METRICS)


def test_a_row_that_nobody_shows_is_found() -> None:
    found = checks.unshown(queries(), "", "", [NEW])
    assert [problem.split(" is ")[1].split(";")[0] for problem in found] == [
        f"not in {REFERENCE}",
        f"in no panel and not in {GUIDE}",
    ]
    # A panel or a word in the guide is enough for the second, and only the reference for the first.
    assert checks.unshown([], "not drawn: `deltamem_novel_total`", "`deltamem_novel_total`", [NEW]) == []
    assert checks.unshown([Query("rate(deltamem_novel_total[5m])", "")], "", "`deltamem_novel_total`", [NEW]) == []
    assert len(checks.unshown([Query("deltamem_novel_total", "")], "`deltamem_novel_total`", "", [NEW])) == 1


def test_an_alert_without_a_case_is_found() -> None:
    tests = (ROOT / "docker/prometheus/alert-rules.test.yml").read_text()
    assert checks.untested(ALERTS, tests) == []
    (found,) = checks.untested([replace(ALERTS[0], name="DeltaMemServer")], tests)
    assert found.startswith("alert DeltaMemServer is not in docker/prometheus/alert-rules.test.yml")


def test_every_alert_leads_to_a_section_of_the_guide() -> None:
    headings = [line for line in (ROOT / GUIDE).read_text().splitlines() if line.startswith("#")]
    # How Markdown hosts make anchors of headings of one word: in lower case.
    anchors = [heading.lstrip("# ").lower().replace(" ", "-") for heading in headings]
    assert len(anchors) == len(set(anchors))
    assert {alert.anchor for alert in ALERTS} <= set(anchors)


def test_filling_a_filled_page_changes_nothing() -> None:
    page = (ROOT / GUIDE).read_text()
    parts = {name: f"{name} once more" for name in ("panels", "alerts", "recording", "series")}
    filled = guide.fill(page, parts)
    assert filled != page
    assert guide.fill(filled, parts) == filled
