# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem bench`: scenarios, statistics, resuming and the report, with scripted engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deltamem_vllm.cli.main import app
from deltamem_vllm.evaluation import configs
from deltamem_vllm.evaluation.bench.engine import Engine, engine_args
from deltamem_vllm.evaluation.bench.kinds import Scenario, ThroughputScenario
from deltamem_vllm.evaluation.bench.measure import Spread, judge, paired_ratios
from deltamem_vllm.evaluation.bench.report import render
from deltamem_vllm.evaluation.bench.run import DECISIVE, Bench
from deltamem_vllm.evaluation.bench.runs import session
from deltamem_vllm.evaluation.bench.runs.compaction import NothingCompacted
from deltamem_vllm.evaluation.bench.scenario import (
    ScenarioError,
    find_scenario,
    load_scenario,
    parse_scenario,
    shipped_folder,
    suite,
)
from deltamem_vllm.evaluation.bench.settings import Target
from deltamem_vllm.evaluation.bench.traffic import random_prompts
from deltamem_vllm.evaluation.child import ChildFailed
from deltamem_vllm.evaluation.machine import Moment, command_line, describe_code, describe_machine
from deltamem_vllm.evaluation.results import Results, ResultsDamaged, run_id

CONFIGS = Path(__file__).parents[2] / "configs" / "bench"

THROUGHPUT = {
    "kind": "throughput",
    "name": "tiny",
    "question": "Is it faster?",
    "pool_requests": 2,
    "traffic": {"requests": 3, "prompt_tokens": 40, "output_tokens": 4},
    "repeats": 2,
    "targets": [{"measure": "output_tokens_per_s", "at_least": 1.5}],
}
COMPACTION = {
    "kind": "compaction",
    "name": "cost",
    "question": "What does it cost?",
    "prompt_lengths": [64, 128],
    "scorers": ["delta", "tova"],
    "repeats": 2,
    "targets": [{"measure": "compaction_share", "at_most": 0.03}],
}
CONDITIONS = {"model": "toy", "machine": describe_machine(), "code": describe_code(DECISIVE)}


class ScriptedEngine:
    """Stands in for an engine: deltamem is twice as fast, and a compaction takes 2% of the prefill."""

    started: list[str] = []
    rounds: list[tuple[str, list[list[int]]]] = []
    fail_after: int | None = None
    compactions = 1

    def __init__(self, engine_args: dict[str, Any], log: Path, *, stock: bool, stepwise: bool) -> None:
        assert stock == ("additional_config" not in engine_args)
        self.side = log.stem.rpartition("-")[2]
        self.facts = {"vocabulary": 1000, "start_s": 1.0, "policy": None if stock else {"keep_ratio": 0.1}}
        self.started.append(self.side)

    def ready(self) -> ScriptedEngine:
        return self

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def cpu_seconds(self) -> float:
        return 0.0

    def run(
        self, prompts: list[list[int]], output_tokens: int, *, options: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        cls = ScriptedEngine
        if prompts[0] not in random_prompts(2, len(prompts[0]), 1000, "warm-up"):
            if cls.fail_after is not None and len(cls.rounds) == cls.fail_after:
                raise KeyboardInterrupt
            cls.rounds.append((self.side, prompts))
        compacts = not options and self.side != "stock"
        request = {"first_token_s": 1.0, "rest_s": 0.3, "output_tokens": output_tokens, "cached_tokens": 0}
        return {
            "wall_s": 2.0 if self.side == "stock" else 1.0,
            "cpu_s": 2.0,
            "requests": [request] * len(prompts),
            "steps": 4,
            "max_running": 1 if self.side == "stock" else 3,
            "mean_running": 1.0,
            "preemptions": 0,
            "peak_pool_usage": 0.5,
            "policy": {"compactions": cls.compactions, "compaction_us": 20_000, "scoring_us": 10_000}
            if compacts
            else {},
        }


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedEngine]:
    for name, value in (("started", []), ("rounds", []), ("fail_after", None), ("compactions", 1)):
        monkeypatch.setattr(ScriptedEngine, name, value)
    monkeypatch.setattr(session, "Engine", ScriptedEngine)
    return ScriptedEngine


def make_bench(tmp_path: Path, conditions: dict[str, Any] = CONDITIONS) -> Bench:
    return Bench("model", conditions, Results(tmp_path / "bench.jsonl"), tmp_path / "logs", lambda _: None)


def changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**base, **changes}


# ---- scenarios ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_scenarios_load(path: Path, quick: bool) -> None:
    scenario = load_scenario(path, quick=quick)
    assert scenario.name == path.stem
    # `roomy` promises nothing: it says what a machine can do.
    assert bool(scenario.targets) == (path.stem != "roomy")


def test_pressure_has_the_shape_its_targets_are_about() -> None:
    scenario = load_scenario(CONFIGS / "pressure.yaml")
    assert isinstance(scenario, ThroughputScenario)
    assert scenario.pool_blocks == 4 * (1024 + 512) // 32 + 1
    assert scenario.traffic.requests == 24
    assert {str(target) for target in scenario.targets} == {">= 3", ">= 2"}
    assert engine_args(scenario, "m", None).get("additional_config") is None
    assert scenario.policy == {"mode": "always"}, "otherwise the defaults are what is measured"
    default = load_scenario(CONFIGS / "pressure-mode.yaml")
    assert isinstance(default, ThroughputScenario)
    assert (default.traffic, default.pool_blocks) == (scenario.traffic, scenario.pool_blocks)
    assert default.policy == {"mode": "pressure"}


def test_quick_changes_only_what_it_names() -> None:
    document = changed(THROUGHPUT, quick={"repeats": 1, "traffic": {"output_tokens": 2}})
    scenario = parse_scenario(document, "x.yaml", quick=True)
    assert isinstance(scenario, ThroughputScenario)
    assert (scenario.repeats, scenario.traffic.output_tokens, scenario.traffic.prompt_tokens) == (1, 2, 40)
    assert parse_scenario(document, "x.yaml").repeats == 2


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([1], ["x.yaml", "mapping", "list"]),
        ({}, ["kind"]),
        (changed(THROUGHPUT, kind="speed"), ["'serving', 'compaction', 'unbounded', 'conversation'"]),
        (changed(THROUGHPUT, requests=3), ["requests", "Extra inputs"]),
        (changed(THROUGHPUT, repeats=0), ["repeats", "greater than 0", "got 0"]),
        (changed(THROUGHPUT, policy={"keep_rate": 0.1}), ["keep_rate", "keep_ratio"]),
        (changed(THROUGHPUT, policy={"keep_ratio": 7}), ["keep_ratio", "got 7"]),
        (
            changed(THROUGHPUT, targets=[{"measure": "speed", "at_least": 1}]),
            ["speed", "output_tokens_per_s"],
        ),
        (changed(THROUGHPUT, targets=[{"measure": "max_running"}]), ["exactly one of at_least and at_most"]),
        (changed(THROUGHPUT, quick=3), ["quick must be a mapping"]),
        (changed(COMPACTION, scorers=[]), ["scorers", "at least 1"]),
        (changed(COMPACTION, name="No Name"), ["name", "pattern"]),
    ],
)
def test_scenario_errors_say_what_and_where(document: object, words: list[str]) -> None:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(document, "x.yaml", quick=True)
    for word in words:
        assert word in str(caught.value)


def test_a_bare_quick_run_takes_minutes_and_leaves_the_long_ones_out() -> None:
    quick, full = suite(CONFIGS, quick=True), suite(CONFIGS, quick=False)
    assert {one.name for one in full} - {one.name for one in quick} == {
        *("roomy", "long-context", "pressure-crowd", "pressure-decode", "pressure-mode", "pressure-reasoning"),
        *("roomy-pressure", "decode-6k", "dealing"),
    }
    assert {one.kind for one in quick} == {one.kind for one in full}
    assert all(one.minutes is not None for one in full), "every file says how long it takes"
    assert sum(one.minutes.quick for one in quick if one.minutes) <= 15


def test_an_installation_without_scenarios_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shipped_folder() == CONFIGS
    monkeypatch.setattr(configs, "_PACKAGE", tmp_path / "deltamem_vllm")
    with pytest.raises(ScenarioError, match="configs/bench was not installed.*--scenarios"):
        shipped_folder()


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: [")
    with pytest.raises(ScenarioError, match=r"a\.yaml: not valid YAML"):
        load_scenario(tmp_path / "a.yaml")


def test_scenarios_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(THROUGHPUT))
    assert find_scenario("idle", CONFIGS) == CONFIGS / "idle.yaml"
    assert find_scenario(str(own), CONFIGS) == own
    with pytest.raises(ScenarioError, match="no scenario 'idel'; available: capacity, .*, serving, unbounded"):
        find_scenario("idel", CONFIGS)


# ---- traffic and statistics ---------------------------------------------------------------------------


def test_prompts_depend_on_the_seed_alone_and_share_no_block() -> None:
    prompts = random_prompts(50, 64, 5000, "a")
    assert prompts == random_prompts(50, 64, 5000, "a")
    assert prompts != random_prompts(50, 64, 5000, "b")
    assert {len(prompt) for prompt in prompts} == {64}
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 50
    assert all(256 <= token < 5000 - 256 for prompt in prompts for token in prompt)
    assert all(0 <= token < 100 for token in random_prompts(1, 500, 100, "c")[0])


def test_ratios_are_taken_pair_by_pair() -> None:
    # The machine was twice as slow in the second pair: medians of each side would hide it.
    assert paired_ratios({0: 10.0, 1: 5.0, 2: 8.0}, {0: 10.0, 1: 5.0}) == [1.0, 1.0]
    assert paired_ratios({0: 1.0}, {0: 0.0}) == []


def test_spread_and_verdict() -> None:
    spread = Spread.of([3.0, 1.0, 2.0, 10.0])
    assert (spread.median, spread.low, spread.high, spread.count) == (2.5, 1.0, 10.0, 4)
    at_least = Target(measure="x", at_least=2.0)
    assert str(judge(at_least, spread)) == "met, but single repeats disagree"
    assert str(judge(at_least, Spread.of([2.0, 3.0]))) == "met"
    assert str(judge(at_least, Spread.of([1.9]))) == "**not met**"
    assert str(judge(Target(measure="x", at_most=2.0), spread)) == "**not met**, but single repeats disagree"
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_other_work_is_what_is_busy_and_not_ours() -> None:
    before, after = Moment(at=10.0, busy_s=100.0, load=0.0), Moment(at=20.0, busy_s=115.0, load=0.0)
    assert after.others_since(before, ours_s=5.0) == 1.0
    assert after.others_since(before, ours_s=50.0) == 0.0
    assert Moment(at=20.0, busy_s=None, load=0.0).others_since(before, 1.0) is None


# ---- measuring and resuming ---------------------------------------------------------------------------


def test_sides_take_turns_on_the_same_prompts(tmp_path: Path, scripted: type[ScriptedEngine]) -> None:
    make_bench(tmp_path).run(parse_scenario(THROUGHPUT, "x"))
    assert [side for side, _ in scripted.rounds] == ["stock", "deltamem", "stock", "deltamem"]
    first, second, third, fourth = (prompts for _, prompts in scripted.rounds)
    assert first == second and third == fourth
    assert first != third, "prompts that come again are answered from the prefix cache"


@pytest.mark.parametrize(("finished", "left"), [(1, 4), (2, 2), (3, 2)])
def test_interrupted_pairs_are_measured_again_and_finished_ones_kept(
    tmp_path: Path, scripted: type[ScriptedEngine], finished: int, left: int
) -> None:
    scenario = parse_scenario(THROUGHPUT, "x")
    scripted.fail_after = finished
    with pytest.raises(KeyboardInterrupt):
        make_bench(tmp_path).run(scenario)
    scripted.fail_after = None
    scripted.rounds.clear()
    make_bench(tmp_path).run(scenario)
    assert len(scripted.rounds) == left
    scripted.started.clear()
    make_bench(tmp_path).run(scenario)
    assert scripted.started == [], "a finished run starts no engine"


def test_more_repeats_go_on_but_other_conditions_start_over(tmp_path: Path, scripted: type[ScriptedEngine]) -> None:
    make_bench(tmp_path).run(parse_scenario(COMPACTION, "x"))
    assert len(scripted.rounds) == 2 * 2 * 2 * 2, "scorers, lengths, repeats, with and without"
    scripted.rounds.clear()
    make_bench(tmp_path).run(parse_scenario(changed(COMPACTION, repeats=3, targets=[]), "x"))
    assert len(scripted.rounds) == 2 * 2 * 1 * 2
    scripted.rounds.clear()
    make_bench(tmp_path, {**CONDITIONS, "model": "another"}).run(parse_scenario(COMPACTION, "x"))
    assert len(scripted.rounds) == 16


def test_a_compaction_that_did_not_happen_is_an_error(tmp_path: Path, scripted: type[ScriptedEngine]) -> None:
    scripted.compactions = 0
    with pytest.raises(NothingCompacted, match="expected 1 compaction of a prompt of 64 tokens.*min_tokens"):
        make_bench(tmp_path).run(parse_scenario(COMPACTION, "x"))


def test_results_survive_a_crash_and_refuse_damage(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    results = Results(path)
    results.add("r", "stock/0", {"wall_s": 1.0})
    results.add("r", "stock/1", {"wall_s": 2.0})
    with path.open("a") as file:
        file.write('{"run": "r", "key": "sto')
    again = Results(path)
    assert again.get("r", "stock/1") == {"wall_s": 2.0}
    again.add("r", "stock/2", {"wall_s": 3.0})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [
        "stock/0",
        "stock/1",
        "stock/2",
    ]
    path.write_text('{"run": "r"}\n')
    with pytest.raises(ResultsDamaged, match=r"bench\.jsonl:1 is not a result"):
        Results(path)


def test_run_id_does_not_depend_on_the_order_of_keys() -> None:
    assert run_id({"a": 1, "b": 2}) == run_id({"b": 2, "a": 1}) != run_id({"a": 1, "b": 3})


# ---- the report ---------------------------------------------------------------------------------------


def report_of(tmp_path: Path, *scenarios: Scenario) -> str:
    bench, results = make_bench(tmp_path), Results(tmp_path / "bench.jsonl")
    runs = {bench.run(scenario): scenario for scenario in scenarios}
    results = Results(tmp_path / "bench.jsonl")
    return render(results, runs, "deltamem bench")


def test_report_judges_every_target(tmp_path: Path, scripted: type[ScriptedEngine]) -> None:
    text = report_of(tmp_path, parse_scenario(THROUGHPUT, "x"), parse_scenario(COMPACTION, "x"))
    assert "| tiny | output_tokens_per_s, ratio | >= 1.5 | 2.000 | met |" in text
    assert "| cost | compaction_share, delta, 64 tokens | <= 0.03 | 2.0% | met |" in text
    assert "| running at once, most | 1 | 3 | 3.000 |" in text
    assert "| median of 2 | stock | deltamem | ratio |" in text
    assert "2 whole requests" in text
    assert str(CONDITIONS["machine"]["cpu"]) in text
    harder = changed(THROUGHPUT, targets=[{"measure": "max_running", "at_least": 4}])
    assert "| tiny | max_running, ratio | >= 4 | 3.000 | **not met** |" in report_of(
        tmp_path, parse_scenario(harder, "x")
    )


def test_report_of_an_unfinished_run_says_so(tmp_path: Path, scripted: type[ScriptedEngine]) -> None:
    scenario = parse_scenario(THROUGHPUT, "x")
    scripted.fail_after = 1
    bench = make_bench(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        bench.run(scenario)
    text = render(Results(tmp_path / "bench.jsonl"), {bench.run_id(scenario): scenario}, "deltamem bench")
    assert "| tiny | output_tokens_per_s, ratio | >= 1.5 | not measured yet |  |" in text


def test_a_quick_run_is_called_one(tmp_path: Path, scripted: type[ScriptedEngine]) -> None:
    scenario = parse_scenario(COMPACTION, "x")
    run = make_bench(tmp_path).run(scenario)
    results = Results(tmp_path / "bench.jsonl")
    assert "quick run" in render(results, {run: scenario}, "deltamem bench --quick")
    assert "quick run" not in render(results, {run: scenario}, "deltamem bench")


def test_reports_name_no_machine_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/deltamem", "bench", "--out", "/home/me/out", "--quick"])
    assert command_line() == "deltamem bench --out out --quick"


# ---- the command and the engine process ---------------------------------------------------------------


def test_command_lists_scenarios_and_names_what_is_wrong() -> None:
    listed = CliRunner().invoke(app, ["bench", "--list"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [
        *("capacity", "compaction", "conversation", "dealing", "decode-6k", "idle", "latency", "long-context"),
        *(
            "pressure-crowd",
            "pressure-decode",
            "pressure-mode",
            "pressure-reasoning",
            "pressure",
            "roomy-pressure",
            "roomy",
            "serving",
            "unbounded",
        ),
        "in",
    ]
    wrong = CliRunner().invoke(app, ["bench", "idel"])
    assert wrong.exit_code == 1
    assert "no scenario 'idel'; available: capacity, compaction, conversation, dealing, decode-6k, idle" in wrong.output


def test_an_engine_that_dies_shows_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltamem_vllm.evaluation.bench.engine._CHILD", "no_such_module_of_ours")
    with pytest.raises(ChildFailed, match="(?s)ended with status 1.*No module named no_such_module_of_ours"):
        Engine({}, tmp_path / "engine.log", stock=True).ready()


@pytest.mark.slow
def test_throughput_and_compaction_on_real_engines(tmp_path: Path) -> None:
    """A whole run through the command, on the embedded model."""
    documents = [
        changed(
            THROUGHPUT,
            repeats=1,
            traffic={"requests": 4, "prompt_tokens": 300, "output_tokens": 8},
            policy={"mode": "always"},
            targets=[{"measure": "max_running", "at_least": 1}],
        ),
        changed(COMPACTION, repeats=1, prompt_lengths=[320], scorers=["streaming"], policy={"mode": "always"}),
    ]
    for document in documents:
        (tmp_path / f"{document['name']}.yaml").write_text(yaml.safe_dump(document))
    done = CliRunner().invoke(app, ["bench", "--scenarios", str(tmp_path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    cells = Results(tmp_path / "out" / "bench.jsonl")
    ids = {json.loads(line)["run"] for line in cells.path.read_text().splitlines()}
    tiny = next(run for run in ids if cells.get(run, "stock/0"))
    stock, ours = cells.get(tiny, "stock/0"), cells.get(tiny, "deltamem/0")
    assert stock is not None and ours is not None
    assert stock["output_tokens"] == ours["output_tokens"] == 32
    assert stock["policy"] == {} and ours["policy"]["compactions"] == 4
    assert stock["max_running"] == 2 and ours["max_running"] > 2
    assert "| tiny | max_running, ratio | >= 1 |" in (tmp_path / "out" / "bench.md").read_text()
