# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""KVzip's offline scores decide what vLLM keeps, in the evaluation's engine, beside scorers of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from deltamem_vllm.evaluation.eval.grid import Grid, parse_grid
from deltamem_vllm.evaluation.eval.run import Evaluation
from deltamem_vllm.evaluation.results import Results

pytestmark = pytest.mark.slow

DOCUMENT: dict[str, Any] = {
    "name": "live",
    "tasks": ["niah-text"],
    "lengths": {700: 4},
    "solved": 2,
    "settings": ["aware", "agnostic"],
    "policies": ["kvzip", "kvzip-equal", "random-profile"],
    "budgets": [0.25],
    "policy": {"interval": 512},
    "fp8": False,
    "engine": {"concurrency": 2},
}


def test_kvzip_keeps_what_random_choice_in_the_same_bytes_loses(smollm2_path: str, tmp_path: Path) -> None:
    grid: Grid = parse_grid(DOCUMENT, "live.yaml")
    results = Results(tmp_path / "eval.jsonl")
    conditions = {"model": "smollm2", "machine": {}, "code": {}}
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    run = Evaluation(grid, smollm2_path, tokenizer, conditions, results, tmp_path, lambda line: None)
    run.run(1, lambda: None)
    cells = [cell for key, cell in results.cells(run.run_id).items() if key != "conditions" and not cell.get("skipped")]
    kl: dict[str, list[float]] = {}
    for cell in cells:
        kl.setdefault(cell["policy"], []).append(cell["kl"])
        assert cell["compactions"] == (cell["policy"] != "full")
    assert kl.keys() == {"full", "kvzip", "kvzip-equal", "random-profile", "streaming", "random"}
    assert all(len(values) >= 4 for values in kl.values()), "two questions in two settings"
    mean = {policy: sum(values) / len(values) for policy, values in kl.items()}
    # Scores of another request, or in another order, would be a random choice.
    assert mean["kvzip"] < 0.2 < mean["random"]
    assert mean["kvzip"] < 0.5 * mean["random-profile"]
    # The same scores with the same number for every head: that heads share by need is most of what they are worth.
    assert mean["kvzip"] < 0.5 * mean["kvzip-equal"]
    held = {cell["policy"]: cell["resident_bytes"] for cell in cells}
    assert held["kvzip"] <= held["kvzip-equal"] < 0.4 * held["full"]
