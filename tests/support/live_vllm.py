# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A real `vllm serve` and the questions that tests ask it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_S = 400  # on a machine that others use too
KEY = "second-key"
"""One of the keys that the servers ask for, if any."""
Series = dict[str, dict[frozenset[tuple[str, str]], float]]


class Server:
    """A running server and the questions the tests ask it."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def get(self, path: str, key: str | None = KEY) -> httpx.Response:
        # One connection per question: with several API servers each may be answered by another one.
        return httpx.get(f"{self.url}{path}", headers=_bearer(key), timeout=60, verify=False)

    @contextmanager
    def states(self, interval: float) -> Iterator[Iterator[dict[str, Any]]]:
        """The states that /deltamem/stream sends, as long as the block lasts."""
        url = f"{self.url}/deltamem/stream?interval={interval}"
        with httpx.stream("GET", url, headers=_bearer(KEY), timeout=60, verify=False) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield (json.loads(line.removeprefix("data: ")) for line in answer.iter_lines() if line.startswith("data: "))

    def complete(self, prompt: list[int], max_tokens: int, **xargs: Any) -> httpx.Response:
        body = {
            "model": "smollm2",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "vllm_xargs": xargs or None,
        }
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=_bearer(KEY), timeout=600, verify=False)

    def series(self) -> Series:
        """Our series by name and by labels, without the two labels that all of them share."""
        found: Series = {}
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name.startswith("deltamem_") and not sample.name.endswith("_created"):
                    labels = dict(sample.labels)
                    assert labels.pop("model_name") == "smollm2"
                    assert labels.pop("engine", "0") == "0"
                    found.setdefault(sample.name, {})[frozenset(labels.items())] = sample.value
        return found

    def engine(self) -> dict[str, Any]:
        """The only engine's entry in /deltamem/stats."""
        answer = self.get("/deltamem/stats")
        assert answer.status_code == 200, answer.text
        (engine,) = answer.json()["engines"]
        assert isinstance(engine, dict)
        return engine


@contextmanager
def serve(model: str, tmp_path: Path, *flags: str, **variables: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", model, "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", "1024", "--max-num-seqs", "4", "--max-num-batched-tokens", "256"),
        *("--block-size", "32", "--num-gpu-blocks-override", "64", "--enforce-eager"),
        *flags,
    ]
    # VLLM_PLUGINS unset: the routes must not depend on it.
    env = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", **variables}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=tmp_path, start_new_session=True
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", log)
        _wait_until_ready(server, process)
        yield server
    finally:
        # The whole session: engine and API servers are processes of their own.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if server.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    tail = server.log.read_text(errors="replace")[-6000:]
    raise AssertionError(f"server did not start (exit status {process.poll()}):\n{tail}")


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}
