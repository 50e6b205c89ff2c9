# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A real Prometheus with the repository's configuration, for the length of a `with` block."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

START_S = 60


class Prometheus:
    """A running Prometheus and what the tests ask it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **parameters: Any) -> Any:
        """Return `data` of an API answer; fails with Prometheus' own words."""
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", f"{path} {parameters}: {answer.get('error')}"
        return answer["data"]

    def now(self, expr: str) -> dict[frozenset[tuple[str, str]], float]:
        """Return the present values by labels."""
        found = self.ask("query", query=expr)["result"]
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in found}

    def finite(self, expr: str, start: float, end: float) -> list[float]:
        """Return every value that is a number, of all series, second by second."""
        found = self.ask("query_range", query=expr, start=start, end=end, step=1)["result"]
        values = (float(value) for series in found for _, value in series["values"])
        return [value for value in values if math.isfinite(value)]


@contextmanager
def run_prometheus(config_folder: Path, targets: Sequence[str], folder: Path) -> Iterator[Prometheus]:
    """Start Prometheus on the rules and configuration of `config_folder`, with other targets and every second.

    The test is skipped where there is no Prometheus.
    """
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed (Debian package: prometheus; scripts/get-promtool.sh fetches it)")
    for rules in config_folder.glob("*-rules.yml"):
        shutil.copy(rules, folder)
    config = yaml.safe_load((config_folder / "prometheus.yml").read_text())
    config["global"] |= {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": list(targets)}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [program, "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(f"http://{address}", process, folder / "prometheus.log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):  # it does not listen yet
            if httpx.get(f"{url}/-/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(f"prometheus did not start (exit status {process.poll()}):\n{log.read_text()[-4000:]}")
