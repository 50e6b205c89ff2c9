# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Starts what scripts/image_steps.py built, as the image would, and asks it. See scripts/check_cpu_image.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from image_base import StepFailed
from image_steps import Image

START_S = 900  # on a machine that others use too
STOP_S = 60


def ask(image: Image, port: int, further: Sequence[str] = ()) -> None:
    """Start the image's server on `port` of 127.0.0.1, ask it, and stop it. `further`: more flags."""
    # The image listens on its own address and port; here both are the machine's. The last one counts.
    words = [image.move(word) for word in [*image.entrypoint, *image.command]]
    words += ["--host", "127.0.0.1", "--port", str(port), *further]
    log = image.root.parent / "server.log"
    as_user = image.user if os.geteuid() == 0 else None
    print(f"     start as user {as_user if as_user is not None else os.geteuid()}: {' '.join(words)}", flush=True)
    # Nothing of this machine's environment; and no download: the image must bring its model along.
    environment = image.environment() | {"HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            words,
            env=environment,
            cwd=image.move(image.workdir),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=as_user,
            group=as_user,
            extra_groups=[] if as_user is not None else None,
        )
    try:
        _questions(image, server, f"http://127.0.0.1:{port}", environment, log)
        _stop(server)
    finally:
        # A session of its own: what is left of it, whatever happened.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def _questions(image: Image, server: subprocess.Popen[bytes], url: str, environment: dict[str, str], log: Path) -> None:
    began = time.monotonic()
    # The image's own HEALTHCHECK, with the port of this run.
    health = [image.move(word).replace("http://127.0.0.1:8000", url) for word in image.health]
    while subprocess.run(health, env=environment, capture_output=True, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() - began > START_S:
            raise StepFailed(f"the server is not healthy; its log ends:\n{log.read_text(errors='replace')[-4000:]}")
        time.sleep(5)
    print(f"     healthy after {time.monotonic() - began:.0f} s", flush=True)
    model = _json(f"{url}/v1/models")["data"][0]["id"]
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    text = _json(f"{url}/v1/completions", body)["choices"][0]["text"]
    print(f"     completion of {body['prompt']!r}: {text!r}")
    if "Paris" not in text:
        raise StepFailed(f"{model} does not know the capital of France: {text!r}")
    (engine,) = _json(f"{url}/deltamem/stats")["engines"]
    config = _json(f"{url}/deltamem/config")
    print(f"     /deltamem/stats: pool {engine['pool']}; config {json.dumps(config)[:160]}")
    # Otherwise a warning in a log is all that says so, and memory is slower.
    if not any("libtcmalloc" in maps for maps in _maps(server.pid)):
        raise StepFailed("no process of the server has loaded libtcmalloc, which LD_PRELOAD names")


def _json(url: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise StepFailed(f"{url}: status {error.code}: {error.read().decode()[:1000]}") from error


def _maps(session: int) -> list[str]:
    """The memory maps of the processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == session:
                found.append((entry / "maps").read_text())
        except (OSError, ProcessLookupError):
            continue  # ended meanwhile
    return found


def _stop(server: subprocess.Popen[bytes]) -> None:
    """As `docker stop` does: SIGTERM to the first process, which has to end the others."""
    began = time.monotonic()
    server.terminate()
    try:
        server.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired as error:
        raise StepFailed(f"the server still ran {STOP_S} s after SIGTERM") from error
    print(f"     stopped {time.monotonic() - began:.0f} s after SIGTERM, status {server.returncode}")
