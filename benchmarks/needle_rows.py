# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The rows that `needle.py` writes and `needle_report.py` reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from deltamem_vllm.evaluation.needle import Question

WINDOW = 16


@dataclass(frozen=True)
class Variant:
    """How a question is asked: `scorer` None is the full cache."""

    style: str = "opened"
    scorer: str | None = None
    keep_ratio: float = 1.0
    window: int = WINDOW


@dataclass(frozen=True)
class Row:
    """One request and what came of it."""

    server: str
    task: str
    index: int
    seed: int
    style: str
    scorer: str | None
    keep_ratio: float
    window: int
    depth: float
    answer: str
    reply: str
    correct: bool
    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int
    compactions: int
    evicted_tokens: int
    freed_blocks: int
    seconds: float

    @property
    def key(self) -> tuple[object, ...]:
        """What makes a request the same request."""
        return (self.server, self.task, self.index, self.seed, self.style, self.scorer, self.keep_ratio, self.window)


class Rows:
    """The rows so far, on disk and in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._rows = {row.key: row for row in (Row(**json.loads(line)) for line in lines)}

    def add(self, row: Row) -> None:
        """Keep a row; on disk before this returns."""
        with self._path.open("a") as stream:
            stream.write(json.dumps(asdict(row)) + "\n")
        self._rows[row.key] = row

    def find(self, server: str, question: Question, variant: Variant) -> Row | None:
        """The row of this request, if it was made."""
        return self._rows.get((server, question.task, question.index, question.seed, *asdict(variant).values()))

    def all(self) -> list[Row]:
        """Every row, oldest first."""
        return list(self._rows.values())
