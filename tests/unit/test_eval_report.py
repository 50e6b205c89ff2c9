# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem eval`: aggregates, comparisons, the Markdown report and the plots, from made-up rows."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.evaluation.eval.aggregate import Residence
from deltamem_vllm.evaluation.eval.comparison import Versus, compare, versus
from deltamem_vllm.evaluation.eval.heat_maps import depth_map
from deltamem_vllm.evaluation.eval.plot_style import styles
from deltamem_vllm.evaluation.eval.plots import PlotsUnavailable, write_plots
from deltamem_vllm.evaluation.eval.report import render, write_report
from deltamem_vllm.evaluation.eval.tables import CONDITIONS, Column, EvalTable, Group, NothingMeasured
from deltamem_vllm.evaluation.results import Results

RUN = "0123456789ab"
GEOMETRY = {
    "layers": 30, "kv_heads": 3, "head_size": 64, "dtype": "bfloat16", "bytes_per_token": 46080, "block_size": 32,
    "window": 8, "sink_tokens": 4, "recent_tokens": 32, "interval": 128,
}  # fmt: skip
BLOCK = GEOMETRY["bytes_per_token"] * GEOMETRY["block_size"]
THE_CONDITIONS = {
    "grid": {"tasks": ["niah"]},
    "model": "toy-model",
    "machine": {"cpu": "Toy CPU", "cores": 2, "memory_gib": 8.0, "system": "Linux x86_64", "environment": {}},
    "code": {"versions": {"vllm": "0.32.0"}, "commit": "abc", "source_sha256": "def"},
    "geometry": GEOMETRY,
}
SKILL = {"delta": 2.2, "keydiff": 1.0, "snapkv": 1.4, "tova": 2.0, "streaming": -0.5, "random": -2.0}
HARDNESS = {"kv": 0.5, "niah": -0.5, "multi-value": 0.6, "tracking": 5.0}


def row(policy: str, budget: float, right: Iterable[bool], **changes: Any) -> dict[str, Any]:
    """A cell with one answer for each of `right`; everything else may be given."""
    blocks = 100
    cell = {
        "length": 4096, "task": "niah", "index": 0, "seed": 1, "kind": "question", "setting": "aware",
        "policy": policy, "budget": budget, "prompt_tokens": 3190, "forced_tokens": 8,
        "answers": [{"text": "1234567", "tokens": 7, "right": one, "logprob": -0.1} for one in right],
        "measured_tokens": 9, "gold_logprob": 0.0, "agreement": 1.0, "kl": 0.0,
        "resident_bytes": int(blocks * budget) * BLOCK, "full_bytes": blocks * BLOCK, "resident_tokens": 1,
        "logical_tokens": 3200, "compactions": int(policy not in ("full", "fp8")), "cached_tokens": 0, "seconds": 2.0,
        "reply": None,
    }  # fmt: skip
    return cell | changes


def save(path: Path, rows: Iterable[Mapping[str, Any]]) -> Results:
    lines = [{"run": RUN, "key": CONDITIONS, **THE_CONDITIONS}, *({"run": RUN, "key": key(one), **one} for one in rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Results(path)


def key(one: Mapping[str, Any]) -> str:
    return "/".join(str(one[name]) for name in ("length", "task", "index", "setting", "policy", "budget"))


def grid(
    seed: int = 0,
    *,
    samples: int = 8,
    lengths: Sequence[int] = (2048, 4096),
    settings: Sequence[str] = ("aware", "agnostic"),
    budgets: Sequence[float] = (0.5, 0.25, 0.1),
) -> list[dict[str, Any]]:
    """Rows in which skill, budget and length decide, with noise; `tracking` is too hard for the full cache."""
    rng = random.Random(seed)
    columns = [("full", 1.0), ("fp8", 0.5), *((policy, budget) for policy in SKILL for budget in budgets)]
    rows = []
    for length in lengths:
        for task in [*HARDNESS, "prose", "story"]:
            kind = {"prose": "continuation", "story": "generation"}.get(task, "question")
            for setting in settings if kind == "question" else ("text",):
                for index in range(samples):
                    noise = rng.gauss(0, 1)
                    for policy, budget in columns:
                        loss = 0.0 if policy == "full" else 0.001 if policy == "fp8" else 0.3 * -math.log2(budget)
                        loss *= math.exp(
                            -SKILL.get(policy, 0.0) + 0.4 * rng.gauss(0, 1) + 0.5 * (setting == "agnostic")
                        )
                        hard = HARDNESS.get(task, 0.0) + noise + rng.gauss(0, 0.1) - 2.5 + 8 * loss + length / 8192
                        bins = [0.02 * loss * (i + 1) + 0.001 * loss for i in range(8 if kind == "generation" else 4)]
                        rows.append(
                            row(
                                policy, budget, [hard < 0] * (3 if task == "multi-value" else kind == "question"),
                                length=length, task=task, index=index, kind=kind, setting=setting,
                                gold_logprob=-0.3 - loss, kl=loss / 5, agreement=1 / (1 + loss), kl_by_position=bins,
                                depth=(index + 0.5) / samples,
                            )
                        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return save(tmp_path_factory.mktemp("eval") / "eval.jsonl", grid())


def hand_made() -> list[dict[str, Any]]:
    """Ten samples; the full cache solves nine. At 25%: good 9 of 9 (and the tenth), bad 0 of 9, level 8 of 9."""
    rows = []
    for i in range(10):
        rows += [
            row("full", 1.0, [i != 9], index=i, gold_logprob=-0.5),
            row("fp8", 0.5, [i != 9], index=i, gold_logprob=-0.5),
            row("good", 0.25, [True], index=i, gold_logprob=-0.5 - 0.1 * (i % 2)),
            row("level", 0.25, [0 < i < 9], index=i, gold_logprob=-0.6),
            row("bad", 0.25, [i == 9], index=i, gold_logprob=-2.5 - 0.2 * (i % 2), kl=0.25, agreement=0.75),
        ]
    return rows


def section(text: str, title: str) -> str:
    return text.split(f"## {title}")[1].split("\n## ")[0]


# ---- figures ---------------------------------------------------------------------------------------------


def test_retention_counts_only_what_the_full_cache_solves(tmp_path: Path) -> None:
    table = EvalTable(save(tmp_path / "e.jsonl", hand_made()), RUN)
    groups = table.pooled_groups(4096, "aware")
    bad, good = (table.aggregate(groups, Column(policy, 0.25)) for policy in ("bad", "good"))
    assert (bad.retention.value, bad.retention.count) == (0.0, 9)  # type: ignore[union-attr]
    assert (good.retention.value, good.retention.count) == (1.0, 9)  # type: ignore[union-attr]
    assert (bad.asked, bad.credit) == (10, 0.1)
    assert bad.drop.value == pytest.approx(2.1)  # type: ignore[union-attr]
    assert 2.0 <= bad.drop.low < 2.1 < bad.drop.high <= 2.2  # type: ignore[union-attr]
    assert bad.kl.value == 0.25 and bad.agreement.value == 0.75  # type: ignore[union-attr]


def test_only_differences_that_pairs_show_are_called_differences(tmp_path: Path) -> None:
    table = EvalTable(save(tmp_path / "e.jsonl", hand_made()), RUN)
    found = compare(table, table.pooled_groups(4096, "aware"), 0.25, "retention")
    assert {policy: one.standing for policy, one in found.items()} == {"good": "best", "level": "level", "bad": "worse"}
    # Nine pairs of nine go one way, and three policies make three pairs.
    assert found["bad"].p_value == pytest.approx(3 * 2 / 2**9)
    drops = compare(table, table.pooled_groups(4096, "aware"), 0.25, "drop")
    assert {policy: one.standing for policy, one in drops.items()} == {"good": "best", "level": "level", "bad": "worse"}


def test_named_pairs_are_compared_on_the_same_questions(tmp_path: Path) -> None:
    results = save(tmp_path / "e.jsonl", hand_made())
    grid_with_pairs = {"pairs": [["good", "bad"], ["bad", "level"], ["good", "absent"]]}
    results.add(RUN, CONDITIONS, THE_CONDITIONS | {"grid": grid_with_pairs})
    table = EvalTable(results, RUN)
    groups = table.asked_groups(4096, "aware")
    # Sample 9, which the full cache does not solve, is neither won nor lost.
    assert versus(table, groups, 0.25, "good", "bad") == Versus(9, 0, 9, 2 / 2**9)
    assert versus(table, groups, 0.25, "bad", "level") == Versus(0, 8, 9, 2 / 2**8)
    assert versus(table, groups, 0.25, "good", "absent") is None
    retention = section(render(table, RUN, "deltamem eval"), "Retention at equal bytes")
    assert "| aware | 4096 | good : bad | - | **9:0 of 9** |" in retention
    assert "| aware | 4096 | bad : level | - | **0:8 of 9** |" in retention
    assert "good : absent" not in retention
    few = [one for one in hand_made() if one["index"] < 3]
    results = save(tmp_path / "few.jsonl", few)
    results.add(RUN, CONDITIONS, THE_CONDITIONS | {"grid": grid_with_pairs})
    assert "| good : bad | - | 3:0 of 3 |" in render(EvalTable(results, RUN), RUN, "deltamem eval")


def test_ties_are_all_best_and_unpaired_samples_prove_nothing(tmp_path: Path) -> None:
    rows = [row("full", 1.0, [True], index=i) for i in range(40)]
    rows += [row("a", 0.25, [True], index=i) for i in range(20)]
    rows += [row("b", 0.25, [True], index=i) for i in range(20)]
    rows += [row("late", 0.25, [False], index=i) for i in range(20, 40)]
    table = EvalTable(save(tmp_path / "e.jsonl", rows), RUN)
    found = compare(table, table.pooled_groups(4096, "aware"), 0.25, "retention")
    assert {policy: one.standing for policy, one in found.items()} == {"a": "best", "b": "best", "late": "level"}


def test_a_block_more_than_the_budget_is_granularity_and_two_are_not() -> None:
    held = [
        row("tova", 0.25, [True], prompt_tokens=3200, logical_tokens=3200, resident_bytes=blocks * BLOCK)
        for blocks in (25, 26, 27, 30)
    ]
    assert Residence.of(held, GEOMETRY) == Residence(median=0.265, most=0.3, over=2, count=4)
    # Two blocks of tokens were decoded since the prompt, and every policy keeps those.
    later = [one | {"logical_tokens": 3264} for one in held]
    assert Residence.of(later, GEOMETRY).over == 1


def test_what_the_full_cache_failed_was_left_out_on_purpose(tmp_path: Path) -> None:
    rows = [row("full", 1.0, [i < 8], index=i) for i in range(10)]
    rows += [row("tova", 0.25, [i < 4], index=i) for i in range(8)]
    identity = ("length", "task", "index", "seed", "kind", "setting", "policy", "budget")
    left_out = [row("tova", 0.25, [], index=i) for i in (8, 9)]
    rows += [{name: one[name] for name in identity} | {"skipped": True} for one in left_out]
    table = EvalTable(save(tmp_path / "e.jsonl", rows), RUN)
    assert table.missing() == {}
    retention = table.aggregate(table.pooled_groups(4096, "aware"), Column("tova", 0.25)).retention
    assert retention is not None
    assert (retention.value, retention.count) == (0.5, 8)


def test_columns_and_positions_are_in_order(whole: Results) -> None:
    table = EvalTable(whole, RUN)
    assert table.policies == ["full", "fp8", "delta", "keydiff", "snapkv", "tova", "streaming", "random"]
    assert table.budgets == [0.5, 0.25, 0.1]
    assert (table.lengths, table.settings) == ([2048, 4096], ["aware", "agnostic"])
    assert [group.task for group in table.text_groups()] == ["prose", "prose", "story", "story"]
    rows = [row("full", 1.0, [], kind="generation", setting="text", kl_by_position=[0.0, 0.0], index=i) for i in (0, 1)]
    rows += [
        row("tova", 0.1, [], kind="generation", setting="text", kl_by_position=[0.2, 0.4], index=0),
        row("tova", 0.1, [], kind="generation", setting="text", kl_by_position=[0.4], index=1),
    ]
    series = EvalTable(save(whole.path.parent / "positions.jsonl", rows), RUN)
    assert series.aggregate(series.text_groups(), Column("tova", 0.1)).kl_by_position() == pytest.approx([0.3, 0.4])


# ---- the report ------------------------------------------------------------------------------------------


def test_the_report_shows_the_figures_of_hand_made_rows(tmp_path: Path) -> None:
    text = render(EvalTable(save(tmp_path / "e.jsonl", hand_made()), RUN), RUN, "deltamem eval")
    retention = section(text, "Retention at equal bytes")
    assert "| aware | 4096 | **fp8** 1.00 | **good** 1.00 = level |" in retention
    assert "The full cache solves 9 of 10 questions of 1 task: niah 9/10." in retention
    assert "| full | 1 | 1 |" in retention
    assert "| fp8 | **1.00 (.70-1.00) n=9** | - |" in retention
    assert "| good | - | **1.00 (.70-1.00) n=9** |" in retention
    assert "| level | - | .89 (.57-.98) n=9 = |" in retention
    assert "| bad | - | .00 (.00-.30) n=9 |" in retention
    drop = section(text, "Log-prob of the right answer lost, nats per token")
    assert "| level | - | 0.10 (0.10 to 0.10) n=10 = |" in drop
    assert "| bad | - | 2.10 (2.04 to 2.16) n=10 |" in drop
    assert "| niah | 9/10 (.60-.98) |" in section(text, "What the full cache solves")
    held = section(text, "Bytes held")
    assert "| 4096 | full (at 100%) | 100.0% (most 100.0%) | - |" in held
    assert "| 4096 | bad | - | 25.0% (most 25.0%) |" in held
    details = section(text, "Task by task")
    assert "| full 100% | 9/10 |" in details
    assert "| level 25% | 8/9 (.57-.98) |" in details
    assert "| bad 25% | 0.25 (0.25 to 0.25), 75% |" in details
    measured = section(text, "Measured on")
    assert "50 cells, 2.0 s each, 2 min in all" in measured
    assert "model toy-model, seed 1" in measured and "block_size=32" in measured and '"tasks": [' in measured


def test_of_a_task_that_the_full_cache_fails_only_solved_questions_count(tmp_path: Path) -> None:
    rows = hand_made()
    for i in range(10):
        rows.append(row("full", 1.0, [i < 4], task="hard", index=i))
        rows.append(row("bad", 0.25, [True], task="hard", index=i))
    table = EvalTable(save(tmp_path / "e.jsonl", rows), RUN)
    assert [group.task for group in table.pooled_groups(4096, "aware")] == ["niah"]
    text = render(table, RUN, "deltamem eval")
    assert "| hard | 4/10 (.17-.69) full cache fails |" in section(text, "What the full cache solves")
    retention = section(text, "Retention at equal bytes")
    assert "The full cache solves 13 of 20 questions of 2 tasks: hard 4/10, niah 9/10." in retention
    assert "| bad | - | .31 (.13-.58) n=13 |" in retention
    drop = section(text, "Log-prob of the right answer lost, nats per token")
    assert "| bad | - | 2.10 (2.04 to 2.16) n=10 |" in drop
    assert "Left out, full cache fails: hard." in drop
    assert "| full 100% | 4/10 full cache fails | 9/10 |" in section(text, "Task by task")
    assert "| bad 25% | 4/4 (.51-1.00) | 0/9 (.00-.30) |" in section(text, "Task by task")
    assert "Full cache fails: hard (wherever asked)." in section(text, "Shortcomings of this run")


def test_half_solved_is_not_failed(tmp_path: Path) -> None:
    rows = [row("full", 1.0, [i < 5], index=i) for i in range(10)]
    table = EvalTable(save(tmp_path / "e.jsonl", rows), RUN)
    assert not table.full_cache_fails(Group(4096, "aware", "niah"))
    assert "Left out" not in render(table, RUN, "deltamem eval")


def test_shortcomings_are_read_from_the_rows(tmp_path: Path) -> None:
    rows = [one for one in hand_made() if one["policy"] not in ("fp8",)]
    rows[1] |= {"resident_bytes": 28 * BLOCK}
    rows[2] |= {"compactions": 0}
    rows[0] |= {"kl": 0.01}
    table = EvalTable(save(tmp_path / "e.jsonl", rows[:-1]), RUN)
    found = section(render(table, RUN, "deltamem eval"), "Shortcomings of this run")
    assert "Interrupted: 39 of 40 cells of the samples begun are measured. Missing: bad 25%: 1." in found
    assert "Controls that were not run: fp8, streaming, random." in found
    assert "Few samples: fewer than 30 questions that the full cache solves in aware 4096 (9)." in found
    assert (
        "Held more than the budget and the tokens decoded since, by more than one block: good 25% (1 of 10 cells)."
        in found
    )
    assert "nothing was evicted, so that they show the full cache: level 25% (1)." in found
    assert "The full cache differs from its own reference in 1 cell." in found
    assert "One model and 1 seed" in found
    planned = {key(one) for one in rows} | {"4096/niah/10/aware/full/1.0"}
    assert "Interrupted: 39 of 41 cells are measured." in render(table, RUN, "deltamem eval", planned=planned)


def test_a_whole_run_has_no_such_shortcomings(whole: Results) -> None:
    table = EvalTable(whole, RUN)
    found = section(render(table, RUN, "deltamem eval", planned=table.keys), "Shortcomings of this run")
    for word in ("Interrupted", "Controls", "Held more", "evicted", "reference"):
        assert word not in found


def test_a_partial_run_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    rows = grid(samples=2, lengths=(2048,), settings=("agnostic",), budgets=(0.25,))
    for measured in (0, 1, 25, len(rows) - 3):
        results = save(tmp_path / f"{measured}.jsonl", rows[:measured])
        plots = write_plots(tmp_path / str(measured), results, RUN) if measured < 30 else []
        assert bool(plots) == (measured == 25)
        write_report(tmp_path / "r.md", results, RUN, "deltamem eval", plots, planned=[key(one) for one in rows])
        text = (tmp_path / "r.md").read_text()
        assert "## Measured on" in text
        assert "nan" not in text and "inf" not in text.replace("interval", "")
        if measured:
            assert f"Interrupted: {measured} of {len(rows)} cells are measured." in text
        else:
            assert "No cell of this run is measured yet." in text


def test_rows_before_their_full_cache_are_named_not_pooled(tmp_path: Path) -> None:
    rows = [*hand_made(), row("good", 0.25, [True], task="late"), row("good", 0.25, [True], index=10)]
    table = EvalTable(save(tmp_path / "e.jsonl", rows), RUN)
    retention = section(render(table, RUN, "deltamem eval"), "Retention at equal bytes")
    assert "Left out, full cache not measured yet: late." in retention
    assert "| good | - | **1.00 (.70-1.00) n=9** |" in retention


def test_a_cell_of_fewer_samples_says_so(tmp_path: Path) -> None:
    rows = [one for one in hand_made() if one["policy"] != "bad" or one["index"] < 5]
    text = render(EvalTable(save(tmp_path / "e.jsonl", rows), RUN), RUN, "deltamem eval")
    assert "| bad | - | .00 (.00-.43) n=5 = |" in section(text, "Retention at equal bytes")


def test_fidelity_of_texts_and_by_position(whole: Results) -> None:
    text = render(EvalTable(whole, RUN), RUN, "deltamem eval")
    fidelity = section(text, "Fidelity: KL to the full cache in nats, and agreement")
    assert "**prose, 2048 tokens**, 8 texts" in fidelity
    assert "| full | 0, 100% | 0, 100% | 0, 100% |" in fidelity
    assert "<summary>story, 4096 tokens: KL by position of the generated token</summary>" in fidelity
    assert "| policy | 1-32 | 33-64 | 65-96 | 97-128 | 129-160 | 161-192 | 193-224 | 225-256 |" in fidelity
    assert "<summary>prose" not in fidelity
    assert "Partial credit" in section(text, "Task by task")


def test_a_full_grid_stays_readable(tmp_path: Path) -> None:
    rows = grid(
        samples=3,
        lengths=(2048, 4096, 7168),
        settings=("aware", "agnostic", "two-turn"),
        budgets=(0.5, 0.25, 0.1, 0.05),
    )
    text = render(EvalTable(save(tmp_path / "e.jsonl", rows), RUN), RUN, "deltamem eval")
    folded = 0
    unfolded = []
    for line in text.splitlines():
        folded += line == "<details>"
        if not folded:
            unfolded.append(line)
        folded -= line == "</details>"
    assert folded == 0
    assert len(unfolded) < 450
    assert all(line.count("|") <= 12 for line in unfolded)
    for line, after in zip(unfolded, unfolded[1:], strict=False):
        if line.startswith("|") and after.startswith("|"):
            assert line.count("|") == after.count("|")


def test_an_unknown_run_is_refused(whole: Results) -> None:
    with pytest.raises(NothingMeasured, match="no conditions of run 'other'"):
        EvalTable(whole, "other")


# ---- plots -----------------------------------------------------------------------------------------------


def test_plots_are_written_and_linked(tmp_path: Path) -> None:
    from matplotlib.image import imread

    run = save(tmp_path / "e.jsonl", grid(samples=4, lengths=(2048,), budgets=(0.25, 0.1)))
    plots = write_plots(tmp_path / "plots", run, RUN)
    names = ["retention", "logprob_drop", "kl", "kl_by_position", "tasks_2048", "depth"]
    assert [plot.stem for plot in plots] == names
    for plot in plots:
        picture = imread(plot)
        assert picture.shape[1] > 400 and picture.std() > 0.05, plot
        assert len({tuple(pixel) for pixel in picture[::3, ::3].reshape(-1, picture.shape[2])}) > 20, plot
    write_report(tmp_path / "report.md", run, RUN, "deltamem eval", plots)
    text = (tmp_path / "report.md").read_text()
    assert "![retention](plots/retention.png)" in section(text, "Retention at equal bytes")
    assert section(text, "More plots").count("![") == len(plots) - 1


def test_without_depths_there_is_no_picture_of_them(tmp_path: Path) -> None:
    plots = write_plots(tmp_path, save(tmp_path / "e.jsonl", hand_made()), RUN)
    assert [plot.stem for plot in plots] == ["retention", "logprob_drop", "tasks_4096"]
    # The depth in a row is that of the first question; two-turn asks another.
    rows = [one | {"depth": 0.5, "setting": "two-turn"} for one in hand_made()]
    assert depth_map(EvalTable(save(tmp_path / "two.jsonl", rows), RUN)) is None


def test_without_matplotlib_it_says_what_to_install(whole: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotsUnavailable, match=r"pip install 'deltamem-vllm\[plots\]'"):
        write_plots(Path("unused"), whole, RUN)


def test_a_policy_looks_the_same_in_every_run(whole: Results, tmp_path: Path) -> None:
    rows = [row("full", 1.0, [True]), row("tova", 0.25, [True]), row("mine", 0.25, [True]), row("random", 0.25, [True])]
    few, many = styles(EvalTable(save(tmp_path / "e.jsonl", rows), RUN)), styles(EvalTable(whole, RUN))
    assert few["tova"] == many["tova"] and few["random"] == many["random"]
    assert len({style.colour for style in few.values()}) == 3
    assert len({style.marker for style in many.values()}) == len(many)
    for control in ("fp8", "streaming", "random"):
        red, green, blue = (many[control].colour[i : i + 2] for i in (1, 3, 5))
        assert red == green == blue and many[control].dashes != "-"
