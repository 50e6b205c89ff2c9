# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the rows themselves say against relying on them."""

from __future__ import annotations

from collections.abc import Collection

from deltamem_vllm.evaluation.eval import markdown
from deltamem_vllm.evaluation.eval.grid import FP8, FULL
from deltamem_vllm.evaluation.eval.tables import CONTROLS, Column, EvalTable, Group

FEW = 30
"""Questions below which a share near one half is uncertain by more than about 0.17 either way."""
# KL of a distribution with itself, in nats, after float32 sums over a vocabulary.
_ROUNDING = 1e-5


def shortcomings(table: EvalTable, planned: Collection[str] | None = None) -> list[str]:
    """One sentence or two for each thing a reader should know; never empty."""
    found = [
        *_unfinished(table, planned),
        *_missing_controls(table),
        *_few_samples(table),
        *_failed_tasks(table),
        *_over_budget(table),
        *_nothing_evicted(table),
        *_own_reference(table),
    ]
    seeds = len({row["seed"] for row in table.rows()})
    found.append(f"One model and {markdown.plural(seeds, 'seed')}: other models may rank policies otherwise.")
    return found


def _unfinished(table: EvalTable, planned: Collection[str] | None) -> list[str]:
    rows = len(table.rows())
    if planned is not None:
        done = len(table.keys & set(planned))
        return [f"Interrupted: {done} of {len(planned)} cells are measured."] if done < len(planned) else []
    missing = table.missing()
    if not missing:
        return []
    count = sum(missing.values())
    where = ", ".join(f"{policy} {markdown.percent(budget)}: {n}" for (policy, budget), n in missing.items())
    return [f"Interrupted: {rows} of {rows + count} cells of the samples begun are measured. Missing: {where}."]


def _missing_controls(table: EvalTable) -> list[str]:
    absent = [control for control in CONTROLS if control not in table.policies]
    return [f"Controls that were not run: {', '.join(absent)}."] if absent else []


def _few_samples(table: EvalTable) -> list[str]:
    counts = {}
    for setting in table.settings:
        for length in table.lengths:
            groups = table.asked_groups(length, setting)
            whole = table.aggregate(groups, Column(FULL, 1.0)).retention
            if groups and whole is not None and whole.count < FEW:
                counts[f"{setting} {length}"] = whole.count
    if not counts:
        return []
    where = ", ".join(f"{name} ({count})" for name, count in counts.items())
    return [f"Few samples: fewer than {FEW} questions that the full cache solves in {where}. Read the intervals."]


def _failed_tasks(table: EvalTable) -> list[str]:
    asked: dict[str, list[Group]] = {}
    for setting in table.settings:
        for length in table.lengths:
            for group in table.groups(length, setting):
                asked.setdefault(group.task, []).append(group)
    found = []
    for task, groups in sorted(asked.items()):
        failed = [group for group in groups if table.full_cache_fails(group)]
        where = ", ".join(f"{group.setting} {group.length}" for group in failed)
        if failed:
            found.append(f"{task} ({where if len(failed) < len(groups) else 'wherever asked'})")
    return [f"Full cache fails: {'; '.join(found)}. Of these only retention is pooled."] if found else []


def _over_budget(table: EvalTable) -> list[str]:
    over = []
    for column in table.columns:
        held = [found for length in table.lengths if (found := table.residence(length, column)) is not None]
        count = sum(found.over for found in held)
        if count:
            of = sum(found.count for found in held)
            over.append(f"{column.policy} {markdown.percent(column.budget)} ({count} of {of} cells)")
    if not over:
        return []
    return [f"Held more than the budget and the tokens decoded since, by more than one block: {', '.join(over)}."]


def _nothing_evicted(table: EvalTable) -> list[str]:
    idle: dict[Column, int] = {}
    for row in table.rows():
        if row["policy"] not in (FULL, FP8) and row["budget"] < 1 and not row["compactions"]:
            column = Column(row["policy"], row["budget"])
            idle[column] = idle.get(column, 0) + 1
    if not idle:
        return []
    where = ", ".join(f"{policy} {markdown.percent(budget)} ({n})" for (policy, budget), n in sorted(idle.items()))
    return [f"Cells in which nothing was evicted, so that they show the full cache: {where}."]


def _own_reference(table: EvalTable) -> list[str]:
    rows = [row for row in table.rows() if row["policy"] == FULL]
    off = sum(row["kl"] > _ROUNDING or row["agreement"] < 1 for row in rows)
    return [f"The full cache differs from its own reference in {markdown.plural(off, 'cell')}."] if off else []
