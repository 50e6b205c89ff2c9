# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which samples a run measures next: all that a grid lists, or as many as it takes to have enough solved questions.

A sample is wanted in a setting as long as fewer than the wanted number of those before it, in the grid's order, are
known to be solved by the full cache. So an interrupted run goes on with the same samples.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamem_vllm.evaluation.eval.aggregate import solved
from deltamem_vllm.evaluation.eval.encode import Setting
from deltamem_vllm.evaluation.eval.grid import FULL, Grid
from deltamem_vllm.evaluation.eval.plan import cell_key, settings_of
from deltamem_vllm.evaluation.tasks import TASKS


@dataclass(frozen=True)
class Drawn:
    """A sample and the settings in which some of its cells are missing."""

    length: int
    task: str
    index: int
    settings: tuple[Setting, ...]

    @property
    def sample(self) -> tuple[int, str, int]:
        """Length, task and index."""
        return self.length, self.task, self.index


class Drawing:
    """Hands samples out to workers, in batches of one length.

    Parameters
    ----------
    grid
        What is asked for.
    row
        A measured cell by its key, or None.
    most, least
        Samples of a batch. Near its end a run with wanted numbers hands out less than the most, so as not to measure
        more than it needs, and not less than the least, which keeps an engine busy.
    """

    def __init__(self, grid: Grid, row: Callable[[str], Mapping[str, Any] | None], most: int, least: int) -> None:
        self._grid = grid
        self._row = row
        self._most, self._least = most, least
        self._samples: dict[int, list[tuple[str, int]]] = {}
        for length, task, index in grid.samples():
            self._samples.setdefault(length, []).append((task, index))
        self._lengths = list(self._samples)
        self._handed: set[tuple[int, str, int]] = set()
        self._lock = threading.Lock()

    def next(self) -> list[Drawn]:
        """The next batch; empty when nothing is missing that is not at work."""
        with self._lock:
            for length in list(self._lengths):
                # Lengths take turns, so that an interrupted run has some of each.
                self._lengths.append(self._lengths.pop(0))
                batch = self._batch(length)
                if batch:
                    self._handed |= {one.sample for one in batch}
                    return batch
            return []

    def finished(self, batch: Sequence[Drawn]) -> None:
        """All cells of a batch are in the results."""
        with self._lock:
            self._handed -= {one.sample for one in batch}

    def left(self) -> int:
        """Cells to come; an estimate where numbers of solved questions are wanted: some are measured in vain."""
        points = len(self._grid.points())
        count = 0
        for length, samples in self._samples.items():
            wanted = self._grid.solved.get(length, 0)
            known: Counter[Setting] = Counter()
            unknown: Counter[Setting] = Counter()
            for task, index in samples:
                for setting in settings_of(self._grid, task):
                    missing = self._missing(length, task, index, setting)
                    if not self._is_counted(length, task):
                        count += missing
                    elif not self._is_known(length, task, index, setting):
                        unknown[setting] += 1
                    elif self._is_solved(length, task, index, setting):
                        count += missing
                        known[setting] += 1
            count += sum(min(max(wanted - known[one], 0), unknown[one]) * points for one in unknown)
        return count

    def short(self) -> list[str]:
        """Where all samples together do not have as many solved questions as are wanted."""
        found = []
        for length, wanted in self._grid.solved.items():
            for setting in self._counted_settings(length):
                count = sum(self._is_solved(length, task, index, setting) for task, index in self._samples[length])
                if count < wanted:
                    found.append(f"{setting} {length}: {count} of {wanted}")
        return found

    # ---- what is wanted --------------------------------------------------------------------------------------

    def _batch(self, length: int) -> list[Drawn]:
        wanted = self._grid.solved.get(length, 0)
        # Solved questions: known so far in the grid's order, and all that there may be when what is at work is done.
        before: Counter[Setting] = Counter()
        likely = self._solved_or_at_work(length)
        batch: list[Drawn] = []
        for task, index in self._samples[length]:
            counted = self._is_counted(length, task)
            settings = []
            for setting in settings_of(self._grid, task):
                enough = counted and (
                    before[setting] >= wanted or (likely[setting] >= wanted and len(batch) >= self._least)
                )
                if not enough or self._is_begun(length, task, index, setting):
                    settings.append(setting)
                before[setting] += counted and self._is_solved(length, task, index, setting)
            missing = tuple(one for one in settings if self._missing(length, task, index, one))
            if missing and (length, task, index) not in self._handed:
                batch.append(Drawn(length, task, index, missing))
                likely.update(one for one in missing if counted and not self._is_known(length, task, index, one))
                if len(batch) == self._most:
                    break
        return batch

    def _solved_or_at_work(self, length: int) -> Counter[Setting]:
        counts: Counter[Setting] = Counter()
        for task, index in self._samples[length]:
            if self._is_counted(length, task):
                at_work = (length, task, index) in self._handed
                for setting in settings_of(self._grid, task):
                    known = self._is_known(length, task, index, setting)
                    counts[setting] += self._is_solved(length, task, index, setting) if known else at_work
        return counts

    def _is_counted(self, length: int, task: str) -> bool:
        return length in self._grid.solved and TASKS[task].kind == "question"

    def _counted_settings(self, length: int) -> list[Setting]:
        tasks = {task for task, _ in self._samples[length] if self._is_counted(length, task)}
        return sorted({setting for task in tasks for setting in settings_of(self._grid, task)})

    def _is_known(self, length: int, task: str, index: int, setting: Setting) -> bool:
        return self._row(cell_key(length, task, index, setting, FULL, 1.0)) is not None

    def _is_solved(self, length: int, task: str, index: int, setting: Setting) -> bool:
        row = self._row(cell_key(length, task, index, setting, FULL, 1.0))
        return row is not None and solved(row)

    def _is_begun(self, length: int, task: str, index: int, setting: Setting) -> bool:
        """Whether policies were asked already: then the others are, too, or the sample would be of no use."""
        rows = (self._row(key) for key in self._keys(length, task, index, setting)[1:])
        return any(row is not None for row in rows)

    def _missing(self, length: int, task: str, index: int, setting: Setting) -> int:
        return sum(self._row(key) is None for key in self._keys(length, task, index, setting))

    def _keys(self, length: int, task: str, index: int, setting: Setting) -> list[str]:
        return [cell_key(length, task, index, setting, *point) for point in self._grid.points()]
