# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Capacity, latency and serving scenarios: parsing, turns, resuming, report and plots, with scripted engines."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deltamem_vllm.cli.main import app
from deltamem_vllm.evaluation.bench.client import ClientFailed, client_cell, client_command, run_client
from deltamem_vllm.evaluation.bench.kinds import CapacityScenario, LatencyScenario, ServingScenario
from deltamem_vllm.evaluation.bench.report import write_report
from deltamem_vllm.evaluation.bench.run import DECISIVE, Bench
from deltamem_vllm.evaluation.bench.runs import serving, session
from deltamem_vllm.evaluation.bench.scenario import ScenarioError, parse_scenario
from deltamem_vllm.evaluation.bench.traffic import random_prompts
from deltamem_vllm.evaluation.machine import describe_code, describe_machine
from deltamem_vllm.evaluation.results import Results

CAPACITY = {
    "kind": "capacity",
    "name": "cap",
    "question": "How many fit?",
    "prompt_tokens": 64,
    "output_tokens": 32,
    "pool_tokens": 330,
    "engine": {"max_num_seqs": 8},
    "policy": {"mode": "always"},
    "repeats": 2,
    "targets": [{"measure": "requests_held", "at_least": 3}],
}
LATENCY = {
    "kind": "latency",
    "name": "lat",
    "question": "How fast?",
    "prompt_lengths": [300, 600],
    "batch_sizes": [1, 2],
    "decode_tokens": 4,
    "policy": {"mode": "always"},
    "repeats": 2,
    "targets": [{"measure": "per_token_s", "at_most": 1}],
}
SERVING = {
    "kind": "serving",
    "name": "srv",
    "question": "What does a client see?",
    "pool_requests": 2,
    "traffic": {"requests": 4, "prompt_tokens": 300, "output_tokens": 16},
    "max_concurrency": 3,
    "policy": {"mode": "always"},
    "repeats": 2,
    "targets": [{"measure": "p99_ttft_ms", "at_most": 1}],
}
KINDS = {"capacity": CAPACITY, "latency": LATENCY, "serving": SERVING}
CONDITIONS = {"model": "toy", "machine": describe_machine(), "code": describe_code(DECISIVE)}


class Script:
    """What scripted engines and servers were asked, and after how many rounds the user loses patience."""

    def __init__(self) -> None:
        self.rounds: list[tuple[str, Any]] = []
        self.started: list[str] = []
        self.fail_after: int | None = None
        self.held = {"stock": [2, 2], "deltamem": [8, 8]}

    def note(self, side: str, what: Any) -> int:
        """Write a round down and return how many there were on this side before."""
        if self.fail_after == len(self.rounds):
            raise KeyboardInterrupt
        self.rounds.append((side, what))
        return sum(name == side for name, _ in self.rounds) - 1


class ScriptedEngine:
    """deltamem decodes twice as fast, stalls for 0.3 s where stock vLLM takes 0.2 s, and holds four times as many."""

    script: Script

    def __init__(self, engine_args: dict[str, Any], log: Path, *, stock: bool, stepwise: bool) -> None:
        self.side = log.stem.rpartition("-")[2]
        self.facts = {"vocabulary": 1000, "start_s": 1.0, "policy": None if stock else {"keep_ratio": 0.1}}
        self.stepwise = stepwise
        self.script.started.append(self.side)

    def ready(self) -> ScriptedEngine:
        return self

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
        assert not self.stepwise
        if prompts[0] not in random_prompts(2, len(prompts[0]), 1000, "warm-up"):
            self.script.note(self.side, prompts)
        per_token, stall = (0.2, 0.2) if self.side == "stock" else (0.1, 0.3)
        first = len(prompts[0]) / 100
        arrivals = [(first, 1)] + [(first + stall + per_token * n, n + 2) for n in range(output_tokens - 1)]
        request = {"first_token_s": first, "rest_s": 1.0, "output_tokens": output_tokens, "arrivals": arrivals}
        policy = {} if self.side == "stock" else {"compactions": len(prompts)}
        return {"requests": [request] * len(prompts), "cpu_s": 1.0, "policy": policy}

    def ramp(self, prompts: list[list[int]], output_tokens: int) -> dict[str, Any]:
        assert self.stepwise and len(prompts) == 8 and output_tokens == 32
        held = self.script.held[self.side][self.script.note(self.side, prompts)]
        steps = [
            {
                "added": n,
                "decoding": min(n, held),
                "running": min(n, held),
                "waiting": max(n - held, 0),
                "preempted": 0,
                "context_tokens": 65 * min(n, held),
                "pool_usage": 0.8,
            }
            for n in range(1, min(held + 1, 8) + 1)
        ]
        end = "limit" if held == 8 else "wait"
        return {"ended_by": end, "steps": steps, "wall_s": 3.0, "cpu_s": 3.0, "policy": {}}


class ScriptedServer:
    """A server whose compactions are counted by the client's rounds."""

    def __init__(self, script: Script, side: str) -> None:
        self.url = f"http://{side}"
        self._script = script
        self._side = side

    def get(self, path: str) -> str:
        assert path == "/metrics"
        rounds = sum(side == self._side for side, _ in self._script.rounds)
        lines = [f'vllm:num_preemptions_total{{engine="{n}"}} {3 * rounds}.0' for n in (0, 1)]
        if self._side == "deltamem":
            lines.append(f'deltamem_compactions_total{{engine="0"}} {4 * rounds}.0')
        return "\n".join(lines) + "\n"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    made = Script()

    @contextmanager
    def serve(
        model: str, log: Path, *, deltamem: object, flags: list[str], report: object, environment: object
    ) -> Iterator[ScriptedServer]:
        side = log.stem.rpartition("-")[2]
        assert (deltamem is None) == (side == "stock")
        # Stock is vLLM without any plugin.
        assert environment == ({"VLLM_PLUGINS": ""} if side == "stock" else None)
        made.started.append(side)
        yield ScriptedServer(made, side)

    def run_client(command: list[str], report: Path, log: Path, timeout_s: float) -> dict[str, Any]:
        side = command[command.index("--base-url") + 1].removeprefix("http://")
        made.note(side, command)
        slow = 2.0 if side == "stock" else 1.0
        found = {name: 10.0 * slow for name in ServingScenario.measures}
        throughputs = {"request_throughput": 4 / slow, "output_throughput": 64 / slow, "duration": slow}
        counts = {"completed": 4, "failed": 0, "total_input_tokens": 1200, "total_output_tokens": 64}
        return {**found, **throughputs, **counts, "date": "today"}

    monkeypatch.setattr(ScriptedEngine, "script", made, raising=False)
    monkeypatch.setattr(session, "Engine", ScriptedEngine)
    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr(serving, "run_client", run_client)
    monkeypatch.setattr(serving, "_warm_up", lambda server, scenario: None)
    return made


def make_bench(tmp_path: Path) -> Bench:
    return Bench("model", CONDITIONS, Results(tmp_path / "bench.jsonl"), tmp_path / "logs", lambda _: None)


def report_of(tmp_path: Path, document: dict[str, Any]) -> str:
    scenario = parse_scenario(document, "x")
    run = make_bench(tmp_path).run(scenario)
    write_report(tmp_path / "bench.md", Results(tmp_path / "bench.jsonl"), {run: scenario}, "deltamem bench")
    return (tmp_path / "bench.md").read_text()


# ---- scenarios ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({**CAPACITY, "pool_tokens": 95}, ["pool_tokens is 95", "one whole request of 96 tokens"]),
        ({**CAPACITY, "traffic": {}}, ["traffic", "Extra inputs"]),
        ({**LATENCY, "prompt_lengths": [300, 300]}, ["300 is listed twice"]),
        ({**LATENCY, "batch_sizes": []}, ["batch_sizes", "at least 1"]),
        ({**LATENCY, "decode_tokens": 1}, ["decode_tokens", "got 1"]),
        ({**SERVING, "request_rate": 0}, ["request_rate", "greater than 0"]),
        ({**SERVING, "targets": [{"measure": "ttft", "at_most": 1}]}, ["unknown measure 'ttft'", "median_ttft_ms"]),
    ],
)
def test_scenario_errors_say_what_and_where(document: object, words: list[str]) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(document, "x.yaml")
    for word in ("x.yaml", *words):
        assert word in str(caught.value)


def test_pools_and_longest_requests() -> None:
    capacity, latency = parse_scenario(CAPACITY, "x"), parse_scenario(LATENCY, "x")
    assert isinstance(capacity, CapacityScenario) and isinstance(latency, LatencyScenario)
    assert (capacity.max_model_len, capacity.pool_blocks) == (96, 330 // 32 + 1)
    # Alone: second token and four timed ones. Two of 600: one step for 1200 tokens and one for each request more.
    assert latency.output_tokens(1, 600) == 6
    assert latency.output_tokens(2, 600) == 1 + 2 + 6
    assert latency.max_model_len == 609
    assert latency.pool_blocks == 2 * 2 * 20 + 1


def test_what_does_not_change_a_cell_does_not_change_the_run(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    run = bench.run_id(parse_scenario(LATENCY, "x"))
    words = {"repeats": 9, "targets": [], "question": "!", "minutes": {"full": 1, "quick": 1}, "in_quick_suite": False}
    assert bench.run_id(parse_scenario({**LATENCY, **words}, "x")) == run
    assert bench.run_id(parse_scenario({**LATENCY, "decode_tokens": 5}, "x")) != run


# ---- measuring and resuming ---------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "pairs"), [("capacity", 2), ("latency", 8), ("serving", 2)])
def test_sides_take_turns_on_the_same_traffic(tmp_path: Path, script: Script, kind: str, pairs: int) -> None:
    make_bench(tmp_path).run(parse_scenario(KINDS[kind], "x"))
    assert [side for side, _ in script.rounds] == ["stock", "deltamem"] * pairs
    sent = [what[what.index("--seed") + 1] if kind == "serving" else what for _, what in script.rounds]
    assert sent[::2] == sent[1::2]
    assert all(first != second for n, first in enumerate(sent[::2]) for second in sent[2 * n + 2 :: 2])


@pytest.mark.parametrize(("kind", "pairs"), [("capacity", 2), ("latency", 8), ("serving", 2)])
def test_interrupted_pairs_are_measured_whole_and_finished_ones_kept(
    tmp_path: Path, script: Script, kind: str, pairs: int
) -> None:
    scenario = parse_scenario(KINDS[kind], "x")
    script.fail_after = 3
    with pytest.raises(KeyboardInterrupt):
        make_bench(tmp_path).run(scenario)
    script.fail_after = None
    script.rounds.clear()
    make_bench(tmp_path).run(scenario)
    assert len(script.rounds) == 2 * (pairs - 1), "one pair was whole, the other half of one is measured again"
    script.started.clear()
    make_bench(tmp_path).run(scenario)
    assert script.started == [], "a finished run starts nothing"


def test_progress_says_what_is_left(tmp_path: Path, script: Script) -> None:
    said: list[str] = []
    results = Results(tmp_path / "bench.jsonl")
    Bench("model", CONDITIONS, results, tmp_path / "logs", said.append).run(parse_scenario(LATENCY, "x"))
    told = [line for line in said if "repeat" in line]
    # How long it took is the machine's affair.
    assert re.search(r"\(1 of 8, about \d+ (s|min) left\)", told[0])
    assert told[-1] == "lat: repeat 2, 2 x 600 tokens, per token: stock 200.0 ms, deltamem 100.0 ms (8 of 8)"


# ---- the report ---------------------------------------------------------------------------------------


def test_capacity_report(tmp_path: Path, script: Script) -> None:
    text = report_of(tmp_path, CAPACITY)
    assert "| cap | requests_held, ratio | >= 3 | 4.000 | met |" in text
    assert "| requests held | 2 | 8 | 4.000 |" in text
    assert "| their context, tokens | 130 | 520 | 4.000 |" in text
    assert "10 blocks of 32 tokens, 320 tokens in all" in text
    assert "no more were offered: the pool holds at least as many" in text
    assert "Every repeat held the same number of requests." in text


def test_capacity_that_changes_between_repeats_is_pointed_out(tmp_path: Path, script: Script) -> None:
    script.held["deltamem"] = [6, 7]
    text = report_of(tmp_path, CAPACITY)
    assert "| requests held | 2 | 6 (6 to 7) | 3.250 (3.000 to 3.500) |" in text
    assert "**Repeats of deltamem differ.**" in text
    assert "Every repeat" not in text


def test_latency_report(tmp_path: Path, script: Script) -> None:
    text = report_of(tmp_path, LATENCY)
    assert "| lat | per_token_s, ratio, 2 x 600 tokens | <= 1 | 0.500 | met |" in text
    assert "| 1 | 300 | 3.00 | 3.00 | 1.000 | 200.0 | 100.0 | 0.500 | 2 |" in text
    assert "| 2 | 600 | 200.0 | 300.0 | 1.500 | 2 |" in text


def test_serving_report(tmp_path: Path, script: Script) -> None:
    text = report_of(tmp_path, SERVING)
    assert "| srv | p99_ttft_ms, ratio | <= 1 | 0.500 | met |" in text
    assert "| requests/s | 2.000 | 4.000 | 2.000 |" in text
    assert "| ITL, p99, ms | 20.0 | 10.0 | 0.500 |" in text
    assert "| preemptions | 6 | 6 |  |" in text, "summed over engines, growth of one round"
    assert "| compactions | 0 | 4 |  |" in text
    assert "are sent at once, at most 3 of them open at a time" in text
    assert "--num-gpu-blocks-override 23" in text


@pytest.mark.parametrize("kind", KINDS)
def test_plots_are_written_and_linked(tmp_path: Path, script: Script, kind: str) -> None:
    name = f"bench-{KINDS[kind]['name']}.png"
    assert f"]({name})" in report_of(tmp_path, KINDS[kind])
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_before_there_is_a_pair(tmp_path: Path, script: Script) -> None:
    scenario, bench = parse_scenario(SERVING, "x"), make_bench(tmp_path)
    script.fail_after = 1
    with pytest.raises(KeyboardInterrupt):
        bench.run(scenario)
    results = Results(tmp_path / "bench.jsonl")
    write_report(tmp_path / "bench.md", results, {bench.run_id(scenario): scenario}, "deltamem bench")
    assert list(tmp_path.glob("*.png")) == []
    assert "| srv | p99_ttft_ms, ratio | <= 1 | not measured yet |  |" in (tmp_path / "bench.md").read_text()


# ---- vLLM's client ------------------------------------------------------------------------------------


def test_client_command(tmp_path: Path) -> None:
    scenario = parse_scenario({**SERVING, "request_rate": 2.5}, "x")
    assert isinstance(scenario, ServingScenario)
    command = client_command(scenario, "http://h:1", "m", "/tok", 7, tmp_path / "r.json")
    flags = dict(zip(command[3::1], command[4::1], strict=False))
    assert command[1:3] == ["bench", "serve"]
    expected = {"--random-input-len": "300", "--random-output-len": "16", "--num-prompts": "4", "--seed": "7"}
    expected |= {"--request-rate": "2.5", "--max-concurrency": "3", "--result-filename": "r.json"}
    assert expected.items() <= flags.items()
    plain = client_command(scenario.model_copy(update={"request_rate": None}), "u", "m", "/tok", 7, tmp_path / "r")
    assert "--request-rate" not in plain


def scripted_command(code: str) -> list[str]:
    return [sys.executable, "-c", code, "--tokenizer", "nowhere"]


def test_a_client_that_fails_shows_the_end_of_its_log(tmp_path: Path) -> None:
    report, log = tmp_path / "r.json", tmp_path / "r.log"
    with pytest.raises(ClientFailed, match="(?s)status 3.*refused"):
        run_client(scripted_command("print('refused'); raise SystemExit(3)"), report, log, 30)
    report.write_text('{"completed": 1}')
    with pytest.raises(ClientFailed, match="status 0"):
        run_client(scripted_command("pass"), report, log, 30)  # an old report is not taken for a new one
    with pytest.raises(ClientFailed, match="not done after 0 s"):
        run_client(scripted_command("import time; time.sleep(30)"), report, log, 0.2)
    assert run_client(scripted_command(f"open({str(report)!r}, 'w').write('[]')"), report, log, 30) == []


def test_unanswered_requests_and_missing_figures_are_errors() -> None:
    found: dict[str, Any] = dict.fromkeys(ServingScenario.measures, 1.0)
    found |= {"duration": 1.0, "completed": 4, "failed": 0, "total_input_tokens": 8, "total_output_tokens": 8}
    assert client_cell({**found, "date": "x"}, 4) == found
    with pytest.raises(ClientFailed, match="3 of 4 requests were answered and 1 failed"):
        client_cell({**found, "completed": 3, "failed": 1}, 4)
    with pytest.raises(ClientFailed, match="reported no p99_itl_ms"):
        client_cell({name: value for name, value in found.items() if name != "p99_itl_ms"}, 4)


# ---- real engines -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("document", "lines"),
    [
        # 28 blocks: a request of 300 tokens takes 10, so 2 fit and the third finds 8.
        (
            {**CAPACITY, "prompt_tokens": 300, "output_tokens": 128, "pool_tokens": 900},
            ["| requests held | 2 | ", "Every repeat held the same number of requests."],
        ),
        ({**LATENCY, "repeats": 1, "batch_sizes": [2]}, ["| 2 | 600 |", "![lat](bench-lat.png)"]),
        ({**SERVING, "repeats": 1}, ["| compactions | 0 | 4 |", "![srv](bench-srv.png)"]),
    ],
    ids=list(KINDS),
)
def test_on_real_engines(tmp_path: Path, document: dict[str, Any], lines: list[str]) -> None:
    """A whole run through the command, on the embedded model: the client needs a tokenizer."""
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(document))
    done = CliRunner().invoke(app, ["bench", "--scenarios", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "bench.md").read_text()
    for line in lines:
        assert line in text
