# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Facts from a child process: a damaged library may kill the child, not the doctor.

The child writes one JSON line per fact to a file, so that what it told before it crashed is not lost, and nothing that
a library prints gets in between.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0


class FactMissing(RuntimeError):
    """A fact could not be found out; the message says why."""


class Facts:
    """What a child tells, waited for when it is first asked.

    Parameters
    ----------
    process
        The child.
    folder
        Of its files; removed in the end.
    timeout_s
        Seconds that it may take.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str], timeout_s: float
    ) -> None:
        self._process = process
        self._folder = folder
        self._timeout_s = timeout_s
        self._told: dict[str, dict[str, Any]] | None = None
        self._log = ""
        self._end = ""

    def get(self, name: str) -> Any:
        """The value of a fact.

        Raises
        ------
        FactMissing
            Finding it out failed in the child, or the child ended before it came to it.
        """
        if self._told is None:
            self._told = self._wait()
        if name not in self._told:
            raise FactMissing(
                f"the process that looks for {name!r} {self._end}; it said last: {self._log or 'nothing'}"
            )
        fact = self._told[name]
        if "error" in fact:
            raise FactMissing(fact["error"])
        return fact["value"]

    def close(self) -> None:
        """End the child if it still runs, and remove its files."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _wait(self) -> dict[str, dict[str, Any]]:
        try:
            self._end = _how_it_ended(self._process.wait(self._timeout_s))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._end = f"did not end within {self._timeout_s:g} s"
        lines = _text(_facts_in(self._folder.name)).splitlines()
        log = [line for line in _text(_log_in(self._folder.name)).splitlines() if line.strip()]
        self._log = " / ".join(log[-3:])
        # A line that was being written when the child died is no fact.
        whole = [line for line in lines if line.endswith("}")]
        return {fact.pop("name"): fact for fact in map(json.loads, whole)}


def start(
    module: str, request: Mapping[str, Any], environment: Mapping[str, str], timeout_s: float = TIMEOUT_S
) -> Facts:
    """Start ``python -m module``, which calls `tell`; the current folder is not on its path, as in a server."""
    folder = tempfile.TemporaryDirectory(prefix="deltamem-doctor-")
    # Nothing is downloaded, nothing reported home, and a finding is not to be looked for among log lines.
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with _log_in(folder.name).open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(_facts_in(folder.name)), json.dumps(dict(request))],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment, **quiet},
        )
    return Facts(process, folder, timeout_s)


def tell(steps: Callable[[Mapping[str, Any]], Mapping[str, Callable[[], Any]]]) -> None:
    """In the child: find out one fact after the other; one that fails is told as an error, and the rest go on.

    Parameters
    ----------
    steps
        From the request: names of facts and what finds them out, JSON values.
    """
    with Path(sys.argv[1]).open("w", encoding="utf-8") as out:
        for name, step in steps(json.loads(sys.argv[2])).items():
            fact: dict[str, Any] = {"name": name}
            try:
                fact["value"] = step()
            except Exception as error:
                fact["error"] = f"{type(error).__name__}: {error}"
            out.write(json.dumps(fact) + "\n")
            out.flush()


def _how_it_ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _facts_in(folder: str) -> Path:
    return Path(folder) / "facts.jsonl"


def _log_in(folder: str) -> Path:
    return Path(folder) / "log"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
