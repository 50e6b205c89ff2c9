# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A scorer that is another one, chosen anew for every compaction.

It lets one server answer for all scorers: a long prompt is computed once, found in the prefix cache by every
later request, and compacted by each scorer in turn. `needle.py` installs it into its server through the entry
point group that any package can use, and writes the choice to a file between two requests. Only sensible with
one request at a time.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView
from deltamem_vllm.scoring.registry import BUILTIN, load_scorer

CHOICE_FILE = "DELTAMEM_BENCH_SCORER_FILE"
"""Environment variable: the JSON file with `scorer` and `window` of the next compactions."""


class SwitchScorer(Scorer):
    """Delegates to the scorer named in a file, and shows it only the newest `window` queries."""

    name = "switch"
    summary = "for benchmarks: the scorer named in a file"
    source = "deltamem benchmarks"
    needs_queries = True

    def __init__(self) -> None:
        self._file = Path(os.environ[CHOICE_FILE])
        self._scorers = {name: load_scorer(name) for name in BUILTIN}
        self._choice: dict[str, Any] = {}

    def score(self, view: ScoreView) -> Tensor:
        if view.layer == 0:
            self._choice = json.loads(self._file.read_text())
        assert view.queries is not None, "needs_queries is set"
        window = self._choice["window"]
        if view.queries.shape[1] < window:
            raise RuntimeError(f"{view.queries.shape[1]} queries were recorded, the benchmark wants {window}")
        view = dataclasses.replace(view, queries=view.queries[:, -window:])
        return self._scorers[self._choice["scorer"]].score(view)
