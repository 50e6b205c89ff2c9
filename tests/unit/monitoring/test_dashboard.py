# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The Grafana dashboard as written: its grid, its ids, its variables, and that Prometheus can read its expressions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltamem_vllm.monitoring.model import Panel
from deltamem_vllm.monitoring.panels import ROWS, panels
from tests.support.promtool import parsed

ROOT = Path(__file__).resolve().parents[3]
GRAFANA = ROOT / "docker" / "grafana"
# Grafana's own; https://grafana.com/docs lists them under global variables.
BUILT_IN = {"__rate_interval", "__range", "__all"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content = json.loads((GRAFANA / "dashboards" / "deltamem.json").read_text())
    assert isinstance(content, dict)
    return content


def _drawn(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_every_panel_of_the_data_is_in_the_file_once(dashboard: dict[str, Any]) -> None:
    titles = [panel["title"] for panel in _drawn(dashboard)]
    assert titles == [panel.title for panel in panels()]
    assert len(set(titles)) == len(titles)
    assert [row["title"] for row in dashboard["panels"] if row["type"] == "row"] == [row.title for row in ROWS]


def test_ids_are_unique_and_positive(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert min(ids) > 0
    for panel in _drawn(dashboard):
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters))
        assert letters


def test_no_two_panels_overlap_and_none_leaves_the_grid(dashboard: dict[str, Any]) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24, panel["title"]
        for y in range(place["y"], place["y"] + place["h"]):
            for x in range(place["x"], place["x"] + place["w"]):
                other = taken.setdefault((x, y), panel["title"])
                assert other == panel["title"], f"{panel['title']} lies on {other}"
    # No hole of a whole line, either: Grafana would close it and move everything.
    assert {y for _, y in taken} == set(range(max(y for _, y in taken) + 1))


def test_panels_stand_under_their_rows(dashboard: dict[str, Any]) -> None:
    order = [(panel["gridPos"]["y"], panel["gridPos"]["x"]) for panel in dashboard["panels"]]
    assert order == sorted(order)
    assert dashboard["panels"][0]["type"] == "row"


def test_every_variable_in_use_is_defined_before_it(dashboard: dict[str, Any]) -> None:
    known = set(BUILT_IN)
    for variable in dashboard["templating"]["list"]:
        assert set(re.findall(r"\$\{?(\w+)", json.dumps(variable))) <= known, variable["name"]
        known.add(variable["name"])
    assert known - BUILT_IN == {"datasource", "model_name", "instance", "engine"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used == (known | {"__range"}) - {"__all"}


def test_every_panel_asks_the_chosen_data_source(dashboard: dict[str, Any]) -> None:
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    for panel in _drawn(dashboard):
        assert panel["datasource"] == wanted
        assert all(target["datasource"] == wanted for target in panel["targets"])


def test_every_expression_looks_at_the_chosen_servers_only(dashboard: dict[str, Any]) -> None:
    for panel in _drawn(dashboard):
        for target in panel["targets"]:
            selectors = re.findall(r"\b(?:deltamem_|vllm:)\w*(\{[^}]*\})?", target["expr"])
            assert all('instance=~"$instance"' in matchers for matchers in selectors), target["expr"]


def test_every_expression_is_read_by_prometheus(dashboard: dict[str, Any], tmp_path: Path) -> None:
    expressions = [
        re.sub(r"\$__\w+", "5m", target["expr"]) for panel in _drawn(dashboard) for target in panel["targets"]
    ]
    assert parsed(expressions, tmp_path) == ""
    assert "could not parse" in parsed([*expressions, "sum by (x) rate(up[5m])"], tmp_path)


def test_a_heat_map_gets_buckets_and_single_numbers_are_asked_for_once(dashboard: dict[str, Any]) -> None:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for panel in _drawn(dashboard):
        kinds.setdefault(panel["type"], []).extend(panel["targets"])
    assert {target["format"] for target in kinds["heatmap"]} == {"heatmap"}
    assert all("sum by (le)" in target["expr"] for target in kinds["heatmap"])
    assert all(target["instant"] and not target["range"] for target in kinds["stat"] + kinds["table"])
    assert all(target["range"] and not target["instant"] for target in kinds["timeseries"] + kinds["heatmap"])


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel.title)
def test_every_panel_says_what_it_means_and_what_to_do(panel: Panel) -> None:
    page = (ROOT / "docs" / "guides" / "monitoring.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith(f"| **{panel.title}** |")]
    assert panel.description in line and panel.action in line
    assert line.count("|") == 4
    # A panel that sends the reader to another one sends him to one that exists.
    named = set(re.findall(r"See \*([^*]+)\*", f"{panel.description} {panel.action}"))
    assert named <= {other.title for other in panels()}


def test_provisioned_source_and_folder_are_the_ones_in_use(dashboard: dict[str, Any]) -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    server = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    assert source["type"] == "prometheus" and source["isDefault"]
    assert source["jsonData"]["timeInterval"] == server["global"]["scrape_interval"]
    (folder,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/deltamem.yaml").read_text())["providers"]
    assert folder["type"] == "file" and folder["options"]["path"].startswith("/")
    assert dashboard["uid"] == "deltamem" and "id" not in dashboard, "an id belongs to one Grafana's database"
