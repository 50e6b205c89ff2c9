# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The report: targets first, then every figure with its spread, then what it was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltamem_vllm.evaluation.bench.kinds import (
    CapacityScenario,
    CompactionScenario,
    ConversationScenario,
    LatencyScenario,
    Scenario,
    ServingScenario,
    ThroughputScenario,
    UnboundedScenario,
)
from deltamem_vllm.evaluation.bench.measure import Spread, judge
from deltamem_vllm.evaluation.bench.report import (
    capacity,
    compaction,
    conversation,
    latency,
    serving,
    throughput,
    unbounded,
)
from deltamem_vllm.evaluation.bench.report.conditions import conditions, engines
from deltamem_vllm.evaluation.bench.report.plots import draw
from deltamem_vllm.evaluation.bench.report.tables import View, shown, table
from deltamem_vllm.evaluation.bench.runs.session import CONDITIONS
from deltamem_vllm.evaluation.results import Results

# Modules with `measured(view, scenario, measure)`, the values that a target is judged by under the words for
# them, and `section(view, scenario)`.
_PARTS: Mapping[type, Any] = {
    ThroughputScenario: throughput,
    CapacityScenario: capacity,
    LatencyScenario: latency,
    ServingScenario: serving,
    CompactionScenario: compaction,
    UnboundedScenario: unbounded,
    ConversationScenario: conversation,
}


def write_report(path: Path, results: Results, runs: Mapping[str, Scenario], command: str) -> None:
    """Write the Markdown report of some runs, by their ids, and the plots beside it.

    Runs that were not started are left out.
    """
    started = {run: scenario for run, scenario in runs.items() if results.get(run, CONDITIONS) is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    plots = {
        run: name
        for run, scenario in started.items()
        if (name := draw(path.parent, View(results, run, scenario.repeats), scenario)) is not None
    }
    path.write_text(render(results, started, command, plots), encoding="utf-8")


def render(results: Results, runs: Mapping[str, Scenario], command: str, plots: Mapping[str, str] | None = None) -> str:
    """The report as Markdown. `plots` are file names of pictures by run."""
    views = {run: View(results, run, scenario.repeats) for run, scenario in runs.items()}
    parts = ["# Stock vLLM against deltamem", "", f"Written by `{command}`.", ""]
    parts += table(
        ("scenario", "measure", "target", "measured", "verdict"),
        [row for run, scenario in runs.items() for row in _verdicts(views[run], scenario)],
    )
    parts += [
        "Measured values are medians, with the lowest and highest repeat in brackets. Ratios are",
        "deltamem / stock, taken pair by pair: the two engines take turns on the same requests. A target is",
        "judged by the median.",
        "",
    ]
    if "--quick" in command.split():
        parts += ["This was a quick run: fewer repeats, and less traffic than some targets are about.", ""]
    for run, scenario in runs.items():
        parts += [f"## {scenario.name}: {scenario.question}", "", *_PARTS[type(scenario)].section(views[run], scenario)]
        if plots and run in plots:
            parts += [f"![{scenario.name}]({plots[run]})", ""]
        parts += engines(views[run], scenario)
    parts += conditions(views, runs)
    return "\n".join(parts).rstrip() + "\n"


def _verdicts(view: View, scenario: Scenario) -> list[Sequence[str]]:
    form = ".1%" if isinstance(scenario, CompactionScenario) else ".3f"
    rows: list[Sequence[str]] = []
    for target in scenario.targets:
        for what, values in _PARTS[type(scenario)].measured(view, scenario, target.measure).items():
            found = (shown(values, form), str(judge(target, Spread.of(values)))) if values else ("not measured yet", "")
            rows.append((scenario.name, what, str(target), *found))
    return rows
