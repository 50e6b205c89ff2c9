# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The GPU kernels on a CPU: Triton's interpreter runs them, in processes of their own, on small inputs.

What it cannot show: whether they compile (test_compiled.py), and anything about tensor cores and speed
(`make gpu-check`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[2] / "support"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SUPPORT / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )


@pytest.mark.parametrize(
    ("operation", "count"),
    [
        pytest.param("attention", 15, marks=pytest.mark.slow),
        ("rows_of_nobody", 2),
        pytest.param("codec", 15, marks=pytest.mark.slow),
        ("gather", 3),
        pytest.param("utility", 5, marks=pytest.mark.slow),
    ],
)
def test_kernels_agree_with_the_definitions(operation: str, count: int) -> None:
    done = run("triton_cases.py", operation)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == count
    wrong = [row for row in rows if not row["error"] <= 1.0]
    assert not wrong, wrong
    # A result that should be wrong is found to be.
    blind = [row for row in rows if not row["control"] > 1.0]
    assert not blind, blind


@pytest.mark.slow
def test_broken_tables_read_nothing_outside_the_pool() -> None:
    done = run("triton_fuzz.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["8"]
    # The guard pages do guard: a kernel that believes the pool to be larger is ended by the system.
    assert run("triton_fuzz.py", "control").returncode == -signal.SIGSEGV
