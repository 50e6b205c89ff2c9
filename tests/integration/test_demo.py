# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""scripts/demo.py as a new user runs it: the real model, server and client."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "scripts" / "demo.py"


def run_demo(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(DEMO), *flags], cwd=folder, capture_output=True, text=True, timeout=550)


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_path")
def test_the_demo_answers_right_from_a_quarter_of_the_cache(tmp_path: Path) -> None:
    demo = run_demo(tmp_path)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert re.search(r"with deltamem \(.* s\): RIGHT", demo.stdout)
    without, kept = (int(tokens) for tokens in re.findall(r"(\d+) slots +[\d.]+ MB", demo.stdout))
    assert without > 3600
    assert kept <= 0.26 * without
    assert int(re.findall(r"deltamem_freed_blocks_total (\d+)", demo.stdout)[0]) > 0
    server = re.findall(r"ready at http://127.0.0.1:(\d+)", demo.stdout)[0]
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"--port {server}" not in processes


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_path")
def test_a_demo_that_answers_wrong_fails(tmp_path: Path) -> None:
    demo = run_demo(tmp_path, "--scorer", "random", "--keep-ratio", "0.02")
    assert demo.returncode == 1, demo.stdout + demo.stderr
    assert "FAILED: the answer read from the reduced cache is wrong" in demo.stdout


@pytest.mark.usefixtures("smollm2_path")
def test_a_port_in_use_is_explained(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        demo = run_demo(tmp_path, "--port", str(port))
    assert demo.returncode == 2
    assert f"port {port} cannot be used" in demo.stderr
    assert "Traceback" not in demo.stderr
