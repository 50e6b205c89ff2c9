# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Write the Prometheus and Grafana files and the tables of docs/guides/monitoring.md.

python scripts/monitoring.py            # writes
python scripts/monitoring.py --check    # writes nothing; exit status 1 and a line for each thing that is wrong
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from deltamem_vllm.monitoring import checks, grafana, guide, prometheus
from deltamem_vllm.monitoring.alerts import ALERTS
from deltamem_vllm.monitoring.panels import ROWS, queries
from deltamem_vllm.monitoring.recording import RECORDING
from deltamem_vllm.telemetry import METRICS

ROOT = Path(__file__).resolve().parents[1]
GUIDE = "docs/guides/monitoring.md"
REFERENCE = "docs/reference/metrics.md"
RULE_TESTS = "docker/prometheus/alert-rules.test.yml"


def render(root: Path) -> dict[str, str]:
    """Return the content of every generated file by its path; the guide's hand-written parts are read from `root`."""
    page = (root / GUIDE).read_text(encoding="utf-8")
    return {
        "docker/grafana/dashboards/deltamem.json": grafana.dashboard(ROWS),
        "docker/grafana/provisioning/dashboards/deltamem.yaml": grafana.dashboard_provisioning(),
        "docker/grafana/provisioning/datasources/prometheus.yaml": grafana.datasource_provisioning(),
        "docker/prometheus/prometheus.yml": prometheus.server_config(),
        "docker/prometheus/recording-rules.yml": prometheus.recording_rules(RECORDING),
        "docker/prometheus/alert-rules.yml": prometheus.alert_rules(ALERTS),
        GUIDE: guide.fill(page, guide.parts(ROWS, RECORDING, ALERTS)),
    }


def problems(root: Path) -> list[str]:
    """Return everything that `--check` complains about."""
    files = render(root)
    on_disk = {path: _read(root / path) for path in files}
    return [
        *checks.undefined(queries(), RECORDING, ALERTS, METRICS),
        *checks.unshown(queries(), on_disk[GUIDE] or "", _read(root / REFERENCE) or "", METRICS),
        *checks.untested(ALERTS, _read(root / RULE_TESTS) or ""),
        *checks.stale(files, on_disk),
    ]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def main() -> None:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something is wrong")
    if parser.parse_args().check:
        found = problems(ROOT)
        print(*found, sep="\n", end="\n" if found else "", file=sys.stderr)
        raise SystemExit(1 if found else 0)
    for path, text in render(ROOT).items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
