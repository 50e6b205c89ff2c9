# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Prometheus' own checker, asked by tests."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest


def promtool(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run promtool in `cwd`; the test is skipped where there is none."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian package: prometheus)")
    return subprocess.run([program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120)


def parsed(expressions: Iterable[str], folder: Path) -> str:
    """Parse expressions; return what promtool has to say against them, nothing if they are all right."""
    # JSON is YAML. One rule each: a name that is used twice would be reported.
    rules = [{"record": f"parsed:{number}", "expr": expr} for number, expr in enumerate(expressions)]
    (folder / "rules.yml").write_text(json.dumps({"groups": [{"name": "parsed", "rules": rules}]}))
    checked = promtool("check", "rules", "rules.yml", cwd=folder)
    return "" if checked.returncode == 0 else checked.stderr


def value(expr: str, series: Mapping[str, str], folder: Path, expected: float, labels: str = "{}") -> str:
    """Evaluate an expression after 30 minutes of one sample a minute; return promtool's complaint, or nothing.

    Parameters
    ----------
    series : mapping
        Values in promtool's notation by series, e.g. ``{'up{job="j"}': "1x30"}``.
    expected : float
        The value that the only sample must have, to six decimals.
    labels : str
        And its labels.
    """
    test = {
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": f"round({expr}, 0.000001)",
                        "eval_time": "30m",
                        "exp_samples": [{"labels": labels, "value": expected}],
                    }
                ],
            }
        ],
    }
    (folder / "test.yml").write_text(json.dumps(test))
    tested = promtool("test", "rules", "test.yml", cwd=folder)
    return "" if tested.returncode == 0 else tested.stdout + tested.stderr
