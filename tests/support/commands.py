# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Runs one command to its end, and says where it hangs if it never ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_command(
    command: Sequence[str | Path], *, environment: Mapping[str, str] = os.environ, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a Python command and return its exit status, stdout and stderr.

    Parameters
    ----------
    command : sequence of str or Path
        The program and its arguments.
    environment : mapping, optional
        All of its environment; that of the tests by default.
    timeout : float, optional
        Seconds.

    Raises
    ------
    AssertionError
        It had not ended by then: with what it printed, the processor time it had used (little of it: the machine
        was busy; much: it ran in circles) and where each of its threads stood.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONFAULTHANDLER": "1"},
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        took, threads = time.monotonic() - began, _threads(process.pid)
        process.send_signal(signal.SIGABRT)  # the fault handler prints its stacks
        try:
            stdout, stderr = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
        raise AssertionError(
            f"{process.args} had not ended after {took:.0f} s\n{threads}\nstdout:\n{stdout}\nstderr:\n{stderr}"
        ) from None
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def _threads(process: int) -> str:
    lines = []
    for thread in sorted(Path(f"/proc/{process}/task").iterdir()):
        fields = (thread / "stat").read_text().rpartition(")")[2].split()
        seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        waits = (thread / "wchan").read_text() if os.access(thread / "wchan", os.R_OK) else "?"
        lines.append(f"{thread.name}: state {fields[0]}, {seconds:.2f} s of processor, waits in {waits}")
    return "\n".join(lines)
