# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem doctor` as users run it: on this installation, without vLLM, and with what breaks vLLM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from deltamem_vllm import __version__
from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.calibration import check_calibration
from deltamem_vllm.doctor.checks.server import check_server
from deltamem_vllm.doctor.findings import Finding
from tests.support.doctor import add_distribution, found, only, python_without

_RUN = "from deltamem_vllm.cli.main import app; app()"
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "sliding_window": 64,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


def run(*arguments: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in an environment in which nothing but the arguments decides."""
    own = ("DELTAMEM_", "VLLM_", "OMP_", "PROMETHEUS_", "PYTHONPATH", "LD_PRELOAD")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return subprocess.run(
        [python, "-P", "-c", _RUN, "doctor", *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def by_check(done: subprocess.CompletedProcess[str]) -> dict[str, list[dict[str, Any]]]:
    told: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(done.stdout)["findings"]:
        told.setdefault(finding["check"], []).append(finding)
    return told


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_this_installation_is_well(smollm2_path: str) -> None:
    del smollm2_path  # made here if it was not yet
    done = run("--json", "--model", "smollm2", "--port", free_port(), VLLM_API_KEY="sk-not-to-be-shown")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sk-not-to-be-shown" not in done.stdout
    told = by_check(done)
    assert json.loads(done.stdout)["passed"] is True
    for check, says in {
        "vLLM": "cpu build",
        "plugins": "knows --kv-cache-policy",
        "patch ledger": "names in vLLM are as expected",
        "native library": "self-test right",
        "OpenMP": "one runtime",
        "torch": "CPU build",
        "compiler": "compiles",
        "model": "scorer predictor",
        "calibration": "scorer `auto` is `predictor-tova`",
        "scorers": "predictor",
        "triton_kernels": "no top-level package",
    }.items():
        assert told[check][-1]["level"] == "ok", told[check]
        assert says in told[check][-1]["found"]


def test_without_vllm_it_says_what_is_missing_and_looks_at_the_rest(tmp_path: Path) -> None:
    python = python_without(tmp_path / "env", "vllm")
    done = run("--json", "--model", "smollm2", python=python)
    assert done.returncode == 1, done.stderr
    told = by_check(done)
    assert told["vLLM"][0]["found"] == "vLLM is not installed" and "pip install" in told["vLLM"][0]["mend"]
    assert told["patch ledger"][0]["found"] == "not checked: vLLM is not installed"
    assert told["native library"][0]["level"] == "ok"
    assert [finding for group in told.values() for finding in group if "the check failed" in finding["found"]] == []


def test_without_torch_it_says_so(tmp_path: Path) -> None:
    python = python_without(tmp_path / "env", "vllm", "torch")
    done = run("--json", python=python)
    assert done.returncode == 1, done.stderr
    told = by_check(done)
    assert told["torch"][0]["found"] == "torch is not installed" and "pip install" in told["torch"][0]["mend"]
    assert "No module named 'torch'" in told["native"][0]["found"]
    assert told["ports"] and told["disk"], "the others are looked at"


def test_two_kinds_of_output_are_refused() -> None:
    done = run("--json", "--report")
    assert done.returncode == 2 and "choose one" in done.stderr


@pytest.mark.slow
def test_a_plugin_that_changes_vllm_and_a_model_that_is_not_served(tmp_path: Path) -> None:
    """Both ends of vLLM's child: another package breaks the ledger; the model's config is one that is refused."""
    code, model = tmp_path / "code", tmp_path / "model"
    add_distribution(code, "breaker", "1.0", entry_points="[vllm.general_plugins]\nbreaker = breaker:break_it\n")
    (code / "breaker.py").write_text(
        "def break_it():\n    from vllm.v1.core.sched.scheduler import Scheduler\n    del Scheduler._preempt_request\n"
    )
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MISTRAL))
    told = by_check(run("--json", "--model", str(model), PYTHONPATH=str(code)))
    assert told["plugins"][0]["level"] == "note" and "breaker" in told["plugins"][0]["found"]
    assert told["patch ledger"][0]["level"] == "error"
    assert "Scheduler._preempt_request" in told["patch ledger"][0]["found"]
    told = by_check(done := run("--json", "--model", str(model), VLLM_PLUGINS="nobody"))
    assert done.returncode == 1
    assert told["model"][0]["level"] == "error" and "sliding window: found a window of 64" in told["model"][0]["found"]
    errors = [finding["found"] for finding in told["plugins"] if finding["level"] == "error"]
    assert len(errors) == 2 and "VLLM_PLUGINS='nobody'" in errors[0] and "does not know" in errors[1]


def calibration_of(model: Path | str, cache: Path) -> Finding:
    (finding,) = found(check_calibration, Asked(str(model), environment={**os.environ, "DELTAMEM_CACHE": str(cache)}))
    return finding


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    finding = calibration_of("smollm2", tmp_path)
    assert finding.level == "warning" and "deltamem model get smollm2" in finding.mend


def test_a_model_without_a_calibration_and_with_a_damaged_one(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**MISTRAL, "sliding_window": None, "num_hidden_layers": 1}))
    names = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    weights = {f"model.layers.0.self_attn.{name}.weight": torch.ones(rows, 64) for name, rows in names.items()}
    save_file(weights, model / "model.safetensors")
    finding = calibration_of(model, tmp_path / "cache")
    assert finding.level == "warning" and "scorer `auto` is `distinct`" in finding.found
    assert finding.mend.startswith(f"deltamem calibrate {model} (writes to {tmp_path}/cache/calibrations/")
    (model / "deltamem").mkdir()
    (model / "deltamem" / "card.json").write_text("{")
    finding = calibration_of(model, tmp_path / "cache")
    assert finding.level == "error" and "card.json cannot be read" in finding.found and "--force" in finding.mend


Answers = dict[str, tuple[int, str]]


@pytest.fixture
def answering() -> Iterator[tuple[str, Answers]]:
    """An HTTP server that says what it is told to."""
    answers: Answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, "{}"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def test_a_server_of_another_version_with_a_dead_engine(answering: tuple[str, Answers]) -> None:
    url, answers = answering
    answers["/health"] = (503, "")
    answers["/deltamem/config"] = (200, '{"version": "0.0.1"}')
    answers["/metrics"] = (200, "# HELP\ndeltamem_compactions_total 1\n")
    dead, version, metrics = found(check_server, Asked(url=url))
    assert (dead.level, version.level, metrics.level) == ("error", "warning", "ok")
    assert "answers 503" in dead.found and f"runs deltamem 0.0.1, here it is {__version__}" in version.found


def test_a_server_without_the_policy(answering: tuple[str, Answers]) -> None:
    url, answers = answering
    answers["/health"] = (200, "")
    answers["/metrics"] = (200, "vllm:num_requests_running 0\n")
    healthy, policy, metrics = found(check_server, Asked(url=url))
    assert (healthy.level, policy.level, metrics.level) == ("ok", "error", "error")
    assert "--kv-cache-policy deltamem" in policy.mend


def test_something_in_between_that_swallows_our_routes(answering: tuple[str, Answers]) -> None:
    url, answers = answering
    answers["/health"] = (200, "")
    answers["/deltamem/config"] = (200, "<html>Sign in</html>")
    assert "proxy" in found(check_server, Asked(url=url))[1].mend


@pytest.mark.parametrize(("url", "says"), [("localhost:8000", "is no URL"), ("http://127.0.0.1:9", "does not answer")])
def test_no_server(url: str, says: str) -> None:
    assert says in only(found(check_server, Asked(url=url)), "error").found
