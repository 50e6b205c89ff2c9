# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Measuring what is missing of a scenario, whatever its kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
from deltamem_vllm.evaluation.bench.runs import (
    capacity,
    compaction,
    conversation,
    latency,
    serving,
    throughput,
    unbounded,
)
from deltamem_vllm.evaluation.bench.runs.session import CONDITIONS, Say, Session
from deltamem_vllm.evaluation.results import Results, run_id

DECISIVE = (
    "child.py",
    "live_server.py",
    *(f"bench/{name}" for name in ("engine.py", "kinds.py", "ramp.py", "traffic.py", "client.py", "runs/")),
)
"""Files under `evaluation/` that decide a figure (see `machine.describe_code`)."""

FAILURES: tuple[type[Exception], ...] = (
    capacity.RampTooLong,
    compaction.NothingCompacted,
    serving.ClientFailed,
    serving.ServerFailed,
)
"""What a measurement may raise for its user to read."""

_MEASURE: Mapping[type, Callable[[Session, Any], None]] = {
    ThroughputScenario: throughput.measure,
    CapacityScenario: capacity.measure,
    LatencyScenario: latency.measure,
    ServingScenario: serving.measure,
    CompactionScenario: compaction.measure,
    UnboundedScenario: unbounded.measure,
    ConversationScenario: conversation.measure,
}


def newest_runs(results: Results, scenarios: Sequence[Scenario]) -> dict[str, Scenario]:
    """The newest run of each scenario, whatever machine and code it was measured with; started ones only."""
    found = {}
    for scenario in scenarios:
        wanted = json.loads(json.dumps(scenario.decisive()))
        runs = [run for run in results.runs() if results.cells(run).get(CONDITIONS, {}).get("scenario") == wanted]
        if runs:
            found[runs[-1]] = scenario
    return found


class Bench:
    """Measures scenarios on one model.

    Parameters
    ----------
    model : str
        What vLLM is given.
    conditions : mapping
        Model name, machine and code: what a run depends on besides its scenario.
    results : Results
        Where cells are kept, and looked for before they are measured.
    logs : Path
        Folder for what engines print.
    say : callable
        Is told of progress, a line at a time.
    """

    def __init__(self, model: str, conditions: Mapping[str, Any], results: Results, logs: Path, say: Say) -> None:
        self._model = model
        self._conditions = conditions
        self._results = results
        self._logs = logs
        self._say = say

    def run(self, scenario: Scenario) -> str:
        """Measure what is missing of a scenario and return the run's id."""
        run = self.run_id(scenario)
        if self._results.get(run, CONDITIONS) is None:
            self._results.add(run, CONDITIONS, {"scenario": scenario.decisive(), **self._conditions})
        session = Session(run, self._model, self._results, self._logs, self._say)
        _MEASURE[type(scenario)](session, scenario)
        return run

    def run_id(self, scenario: Scenario) -> str:
        """Name of the run."""
        return run_id({"scenario": scenario.decisive(), **self._conditions})
