# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The rows of a run, sorted into the cells of tables.

What the full cache does not solve says nothing about whether a policy keeps answers; and of a task that it mostly
fails nothing but the answers that it does find is pooled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from deltamem_vllm.evaluation.eval import grid
from deltamem_vllm.evaluation.eval.aggregate import Aggregate, Pair, Residence, Row, full_score
from deltamem_vllm.evaluation.eval.grid import FP8, FULL
from deltamem_vllm.evaluation.results import Results
from deltamem_vllm.evaluation.statistics import Estimate

CONDITIONS = "conditions"
CONTROLS = (FULL, FP8, *grid.CONTROLS)
"""What every policy is to be compared with, at equal bytes."""
SETTINGS = ("aware", "agnostic", "two-turn", "text")
FAILS_BELOW = 0.5
"""The full cache fails a task at a length and setting if it solves less than this share of its samples."""


class NothingMeasured(ValueError):
    """There are no rows to report."""


class Column(NamedTuple):
    """What was done to the cache."""

    policy: str
    budget: float


class Group(NamedTuple):
    """Samples that belong together."""

    length: int
    setting: str
    task: str


class EvalTable:
    """The rows of one run, finished or not.

    Parameters
    ----------
    results : Results
        The file of rows.
    run : str
        Which of its runs.

    Raises
    ------
    NothingMeasured
        If the file has no such run.
    """

    def __init__(self, results: Results, run: str) -> None:
        conditions = results.get(run, CONDITIONS)
        if conditions is None:
            raise NothingMeasured(
                f"{results.path} has no conditions of run {run!r}, so there is nothing to report. Give an id "
                f"that stands in its lines, or measure with `deltamem eval` first."
            )
        self.conditions: Mapping[str, Any] = conditions
        self.keys: set[str] = set()
        self._skipped: Counter[Column] = Counter()
        self._rows: dict[Group, dict[Column, dict[int, Row]]] = {}
        for key, row in results.cells(run).items():
            if key == CONDITIONS:
                continue
            self.keys.add(key)
            group = Group(row["length"], row["setting"], row["task"])
            column = Column(row["policy"], row["budget"])
            if row.get("skipped"):
                self._skipped[column] += 1
                continue
            self._rows.setdefault(group, {}).setdefault(column, {})[row["index"]] = row

    def rows(self) -> list[Row]:
        """All rows."""
        return [row for columns in self._rows.values() for samples in columns.values() for row in samples.values()]

    @cached_property
    def lengths(self) -> list[int]:
        """Prompt lengths, shortest first."""
        return sorted({group.length for group in self._rows})

    @cached_property
    def settings(self) -> list[str]:
        """Settings in which questions were asked; text without a question is none."""
        found = {group.setting for group in self._rows if self.kind(group) == "question"}
        return sorted(found, key=_rank(SETTINGS))

    @cached_property
    def columns(self) -> list[Column]:
        """Policies and budgets: full, fp8, policies by name, controls; large budgets first."""
        found = {column for columns in self._rows.values() for column in columns}
        return sorted(found, key=lambda column: (*_policy_rank(column.policy), -column.budget))

    @cached_property
    def policies(self) -> list[str]:
        """Policies in the order of `columns`."""
        return list(dict.fromkeys(column.policy for column in self.columns))

    @cached_property
    def budgets(self) -> list[float]:
        """Budgets below the full cache's, largest first."""
        return sorted({column.budget for column in self.columns if column.policy != FULL}, reverse=True)

    def groups(self, length: int, setting: str) -> list[Group]:
        """Tasks at a length in a setting, by name."""
        return sorted(group for group in self._rows if group[:2] == (length, setting))

    def text_groups(self) -> list[Group]:
        """Texts without a question: continuations and generations, by task and length."""
        found = [group for group in self._rows if self.kind(group) != "question"]
        return sorted(found, key=lambda group: (group.task, group.length))

    def kind(self, group: Group) -> str:
        """`question`, `continuation` or `generation`."""
        kind: str = next(row["kind"] for samples in self._rows[group].values() for row in samples.values())
        return kind

    def full_rows(self, group: Group) -> dict[int, Row]:
        """The full cache's rows by sample index."""
        return self._rows[group].get(Column(FULL, 1.0), {})

    def full_score(self, group: Group) -> Estimate | None:
        """How much of a task the full cache solves."""
        return full_score(list(self.full_rows(group).values()))

    def full_cache_fails(self, group: Group) -> bool:
        """Whether the full cache was asked and solves less than half."""
        score = self.full_score(group)
        return score is not None and score.value < FAILS_BELOW

    def asked_groups(self, length: int, setting: str) -> list[Group]:
        """Tasks of which retention is made: the full cache was asked. Whatever it does not solve is no part of it."""
        return [group for group in self.groups(length, setting) if self.full_rows(group)]

    def pooled_groups(self, length: int, setting: str) -> list[Group]:
        """Tasks that other pooled figures are made of: the full cache was asked and does not fail."""
        return [group for group in self.asked_groups(length, setting) if not self.full_cache_fails(group)]

    def aggregate(self, groups: Iterable[Group], column: Column) -> Aggregate:
        """The samples of some tasks under a policy and budget, as far as they and their full cache are measured."""
        return Aggregate(tuple(pair for _, pair in sorted(self.pairs(groups, column).items())))

    def pairs(self, groups: Iterable[Group], column: Column) -> dict[tuple[Group, int], Pair]:
        """The same by sample."""
        found = {}
        for group in groups:
            full = self.full_rows(group)
            for index, row in self._rows[group].get(column, {}).items():
                if index in full:
                    found[group, index] = Pair(row, full[index])
        return found

    def residence(self, length: int, column: Column) -> Residence | None:
        """Bytes held at a length, over all settings and tasks; None if nothing is measured."""
        rows = [
            row
            for group, columns in self._rows.items()
            for row in columns.get(column, {}).values()
            if group.length == length
        ]
        return Residence.of(rows, self.conditions["geometry"]) if rows else None

    def missing(self) -> dict[Column, int]:
        """Cells that are not measured though others of their sample are, by policy and budget."""
        counts = {}
        for column in self.columns:
            samples = sum(len(set().union(*columns.values())) for columns in self._rows.values())
            done = sum(len(columns.get(column, {})) for columns in self._rows.values())
            if done + self._skipped[column] < samples:
                counts[column] = samples - done - self._skipped[column]
        return counts


def _rank(order: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    return lambda name: (order.index(name) if name in order else len(order), name)


def _policy_rank(policy: str) -> tuple[int, str]:
    if policy in (FULL, FP8):
        return (FULL, FP8).index(policy), ""
    return (3 + CONTROLS.index(policy), "") if policy in CONTROLS else (2, policy)
