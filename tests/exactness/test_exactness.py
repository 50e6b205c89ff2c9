# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the engine computes after evicting equals, token by token, what a masked float32 model computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bounds import CONTROL, FAULT, TOLERANCE
from cold_scenarios import COLD_FAST, COLD_MATRIX
from recorded_pages import RecordedPages
from reference import Reference, same_request
from scenario import BLOCK_SIZE, Compaction, Output, Result, Scenario
from scenarios import (
    APPEND_WITH_COMPACTION,
    APPEND_WITH_COMPACTION_EQUAL,
    BATCH,
    BATCH_EQUAL,
    FAST,
    FEW,
    FULL_GRAPH,
    FULL_GRAPH_EQUAL,
    MATRIX,
    REVERSED_WRITES,
    V2_FEW,
    policy,
)
from survivor_checks import check_pages

MATRIX_ONLY = pytest.mark.matrix

FULL_GRAPH_EAGER = dataclasses.replace(FULL_GRAPH, name="runner2-full-graph-eager", graph_rows=0)

EVENTS = ("replays", "padded_replays", "reversed_writes", "mixed_steps", "chunks_on_compacted")

Run = Callable[[Scenario], Result]


@pytest.mark.parametrize(
    "scenario",
    [
        *(pytest.param(s, id=s.name) for s in (*FAST, *COLD_FAST)),
        *(pytest.param(s, id=s.name, marks=pytest.mark.matrix) for s in (*MATRIX, *COLD_MATRIX)),
    ],
)
def test_engine_equals_masked_reference(
    scenario: Scenario, run: Run, reference: Callable[[str], Reference], report_row: Callable[[str], None]
) -> None:
    result = run(scenario)
    assert happened(scenario, result) == []
    assert ran_as_asked(scenario, result) == []
    assert result.free_blocks_at_end == result.blocks, "blocks are lost"
    assert result.evicted_at_end == 0, "a finished request still has evicted tokens"

    for compaction in result.compactions:
        if compaction.pages_file:
            folder = Path(result.directory)
            survivors = torch.load(folder / compaction.file)
            check_pages(compaction, RecordedPages.load(folder / compaction.pages_file), survivors)
    checks = reference(scenario.model).check(result)
    pages = sorted({n // BLOCK_SIZE for c in result.compactions if c.serial for n in (c.fewest, c.most)})
    expected_tokens = sum(len(o.tokens) for o in result.outputs)
    assert len(checks) == expected_tokens > 0
    worst = max(checks, key=lambda check: check.error)
    control = max((check.control for check in checks if check.evicted), default=0.0)
    dealt = f"{pages[0]}..{pages[-1]}" if pages else "equal"
    if cold := sum(c.cold_made for c in result.compactions):
        dealt += f", {cold} cold"
    report_row(
        f"| {scenario.name} | V{scenario.runner} | {scenario.model} | {len(checks)} | {worst.error:.1e} "
        f"| {control:.2g} | {len(result.compactions)} | {len(result.preemptions)} "
        f"| {dealt} |"
    )
    assert worst.error <= TOLERANCE, worst
    if scenario.expected.compactions:
        assert control > CONTROL
    # Where nothing had been evicted yet, mask or no mask is the same.
    assert all(check.control <= TOLERANCE for check in checks if not check.evicted)


def happened(scenario: Scenario, result: Result) -> list[str]:
    """What was expected and did not happen."""
    prompt_len = {o.request: len(o.prompt) for o in result.outputs}
    per_request: dict[str, list[Compaction]] = {}
    for compaction in result.compactions:
        per_request.setdefault(compaction.request, []).append(compaction)
    preempted = {p.request: p.step for p in result.preemptions}
    counts = {
        "compactions": len(result.compactions),
        "prefill_compactions": sum(
            c.logical_len < prompt_len.get(c.request.split("-")[0], 0) for c in result.compactions
        ),
        "repeated_compactions": sum(c.evicted_before > 0 for c in result.compactions),
        "in_place": sum(c.in_place for c in result.compactions),
        "preemptions": len(result.preemptions),
        "preempted_dense": sum(not p.compacted for p in result.preemptions),
        "preempted_compacted": sum(p.compacted for p in result.preemptions),
        "compacted_after_preemption": sum(c.step > preempted.get(c.request, c.step) for c in result.compactions),
        "cached_tokens": sum(o.cached_tokens for o in result.outputs),
        "aborted": len(result.aborted),
        "spread": max((c.spread for c in result.compactions), default=0),
        "equal": sum(c.dealing == "equal" for c in result.compactions),
        "cold_prefill": sum(
            c.cold_made for c in result.compactions if c.logical_len < prompt_len.get(c.request.split("-")[0], 0)
        ),
        "cold_in_place": sum(c.cold_made + c.cold_kept for c in result.compactions if c.in_place),
        "reused_blocks": sum(c.reused_blocks for c in result.compactions),
        "never_compacted": sum(
            not any(same_request(internal, o.request) for internal in per_request) for o in result.outputs
        ),
    }
    for name in ("cold_made", "cold_partial", "cold_kept", "cold_dropped", "lost"):
        counts[name] = sum(getattr(c, name) for c in result.compactions)
    counts |= {name: result.events.get(name, 0) for name in EVENTS}
    wanted = dataclasses.asdict(scenario.expected)
    return [f"{name}: {counts[name]}, wanted {n}" for name, n in wanted.items() if counts[name] < n]


def ran_as_asked(scenario: Scenario, result: Result) -> list[str]:
    """Which of runner, scheduler and compilation were not those of the scenario."""
    environment = result.environment
    wrong = []
    if scenario.asynchronous != (environment["async"] == "True"):
        wrong.append(f"async is {environment['async']}")
    if scenario.config is not None and scenario.asynchronous != ("Async" in environment["scheduler"]):
        wrong.append(f"scheduler is {environment['scheduler']}")
    if scenario.tp == 1 and (scenario.runner == 2) != (".cpu.model_runner" in environment["runner"]):
        wrong.append(f"runner is {environment['runner']}")
    if scenario.compiled != (environment["compilation"] not in ("0", "CompilationMode.NONE")):
        wrong.append(f"compilation mode is {environment['compilation']}")
    return wrong


def test_policy_that_keeps_everything_is_stock(run: Run) -> None:
    """With nothing to evict the flag changes no bit of any log-prob."""
    everything = run(dataclasses.replace(BATCH, name="keep-all", config=policy(keep_ratio=1.0)))
    stock = run(dataclasses.replace(BATCH, name="stock", config=None))
    assert everything.compactions == []
    assert answers(everything.outputs) == answers(stock.outputs)


def answers(outputs: list[Output]) -> list[tuple[str, list[int], list[float]]]:
    return sorted((o.request, o.tokens, o.logprobs) for o in outputs)


def test_judge_accepts_stock_vllm(run: Run, reference: Callable[[str], Reference]) -> None:
    stock = run(dataclasses.replace(BATCH, name="stock", config=None))
    checks = reference(BATCH.model).check(stock)
    assert max(check.error for check in checks) <= TOLERANCE


@pytest.mark.parametrize("scenario", [BATCH, BATCH_EQUAL], ids=lambda scenario: scenario.name)
def test_judge_sees_one_wrong_survivor(scenario: Scenario, run: Run, reference: Callable[[str], Reference]) -> None:
    """One entry off by one, in one head of one layer of each compaction, is beyond the tolerance."""
    checks = reference(scenario.model).check(run(scenario), "survivor")
    assert max(check.error for check in checks) > TOLERANCE


def test_judge_sees_a_compaction_that_never_happened(run: Run, reference: Callable[[str], Reference]) -> None:
    """Forgetting the last compaction of a request must show."""
    result = run(BATCH)
    last = max(result.compactions, key=lambda c: c.evicted_after if c.evicted_before == 0 else 0)
    kept = [c for c in result.compactions if c.request != last.request or c.step < last.step]
    checks = reference(BATCH.model).check(dataclasses.replace(result, compactions=kept))
    assert max(check.error for check in checks) > CONTROL


@pytest.mark.matrix
def test_replayed_graph_records_the_window(run: Run) -> None:
    """Replays and eager steps choose the same survivors, from queries that only replays recorded.

    The reference cannot tell: it takes the survivors from the run.
    """
    replayed, eager = run(FULL_GRAPH), run(FULL_GRAPH_EAGER)
    assert 0 < replayed.events["padded_replays"] < replayed.events["replays"]
    assert eager.events.get("replays", 0) == 0
    assert [(o.request, o.tokens) for o in replayed.outputs] == [(o.request, o.tokens) for o in eager.outputs]
    assert differing_survivors(replayed, eager) == []


@pytest.mark.matrix
def test_survivors_show_a_window_that_replays_do_not_record(run: Run) -> None:
    faulty = run(dataclasses.replace(FULL_GRAPH, name="full-graph-fresh-window", fault="fresh-window-target"))
    # Queries of the prompts are recorded eagerly, so a request's first compaction is still right.
    decided_by_replays = [c for c in faulty.compactions if c.evicted_before > 0]
    assert differing_survivors(faulty, run(FULL_GRAPH_EAGER)) == decided_by_replays != []


@pytest.mark.matrix
def test_no_two_block_table_writes_of_a_step_overlap(run: Run) -> None:
    """Otherwise their order, which a GPU leaves open, would decide."""
    assert run(REVERSED_WRITES).events["overlapping_writes"] == 0


@pytest.mark.parametrize(
    "scenario",
    [
        # The first control of dealt reads runs in `make test`, the others need another run each.
        dataclasses.replace(BATCH, name="wrong-page", fault="wrong-page"),
        *(
            pytest.param(dataclasses.replace(scenario, name=f"{scenario.name}-{fault}", fault=fault), marks=MATRIX_ONLY)
            for scenario, fault in (
                (BATCH, "stock-tables"),
                (V2_FEW, "stock-tables"),
                (V2_FEW, "wrong-page"),
                (FULL_GRAPH, "wrong-page"),
                (FULL_GRAPH, "fresh-page-tables"),
                (FULL_GRAPH, "fresh-pair-lengths"),
                (FULL_GRAPH_EQUAL, "fresh-seq-lens"),
                (APPEND_WITH_COMPACTION, "stock-append"),
                (APPEND_WITH_COMPACTION_EQUAL, "stock-append"),
            )
        ),
    ],
    ids=lambda scenario: scenario.name,
)
def test_judge_sees_a_fault(scenario: Scenario, run: Run, reference: Callable[[str], Reference]) -> None:
    checks = reference(scenario.model).check(run(scenario))
    assert max(check.error for check in checks) > FAULT


@pytest.mark.parametrize("scenario", [FEW, pytest.param(V2_FEW, marks=MATRIX_ONLY)], ids=lambda scenario: scenario.name)
def test_a_stale_page_table_ends_the_run(scenario: Scenario, run: Run) -> None:
    """Scheduler and worker disagree about a request's last compaction: no token may come out of that."""
    with pytest.raises(AssertionError, match="stale page table"):
        run(dataclasses.replace(scenario, name=f"{scenario.name}-stale-serial", fault="stale-serial"))


def differing_survivors(one: Result, other: Result) -> list[Compaction]:
    """Compactions of ``one`` that chose differently in ``other``; both must hold the same ones, in the same order."""

    def what(result: Result) -> list[tuple[int, str, int, int]]:
        return [(c.step, c.request.split("-")[0], c.logical_len, c.keep) for c in result.compactions]

    assert what(one) == what(other)
    pairs = zip(one.compactions, other.compactions, strict=True)
    return [
        a
        for a, b in pairs
        if not torch.equal(torch.load(Path(one.directory, a.file)), torch.load(Path(other.directory, b.file)))
    ]
