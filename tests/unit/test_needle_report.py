# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The table of benchmarks/needle.py: what is counted, and with what uncertainty."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPORT = Path(__file__).resolve().parents[2] / "benchmarks" / "needle_report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("needle_report", REPORT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# From the formula in Wilson (1927) by hand: n = 10, z = 1.96.
@pytest.mark.parametrize(
    ("correct", "low", "high"), [(0, 0.0, 0.2775), (5, 0.2366, 0.7634), (7, 0.3968, 0.8922), (10, 0.7225, 1.0)]
)
def test_wilson_intervals(report: ModuleType, correct: int, low: float, high: float) -> None:
    assert report.wilson(correct, 10) == pytest.approx((low, high), abs=1e-4)


def row(index: int, correct: bool, **changes: Any) -> dict[str, Any]:
    evicted = {"compactions": 1, "evicted_tokens": 750, "freed_blocks": 6}
    fields = {
        "server": "switch",
        "task": "needle",
        "index": index,
        "seed": 1,
        "style": "opened",
        "scorer": "tova",
        "keep_ratio": 0.25,
        "window": 16,
        "reply": "7",
        "correct": correct,
        "prompt_tokens": 1000,
        "cached_tokens": 900,
        "seconds": 1.0,
    }
    return fields | evicted | changes


def full(index: int, correct: bool) -> dict[str, Any]:
    return row(index, correct, scorer=None, keep_ratio=1.0, compactions=0, evicted_tokens=0, freed_blocks=0)


def render(report: ModuleType, rows: list[dict[str, Any]]) -> str:
    text: str = report.render(rows, Namespace(seed=1, keys=3, n=2, most=3, rows=Path("needle.jsonl")))
    return text


def test_cells_are_counted_from_the_rows(report: ModuleType) -> None:
    rows = [full(0, True), full(1, True), full(2, False), row(0, True), row(1, False), row(1, True, seed=2)]
    rows += [row(0, True, window=8)]
    text = render(report, rows)
    assert "| opened | needle | 2/3 (.21-.94) |" in text
    assert "| full cache | 1.0 | 2/2 (.34-1.00) | - | 2/2 (.34-1.00) | 100.0% | 0.0 |" in text
    assert "| tova | 0.25 | 1/2 (.09-.91) | - | 1/2 (.09-.91) | 25.0% | 6.0 |" in text
    assert "| tova | 8 | 1/1 (.21-1.00) |" in text
    assert "at keep ratio 0.25 tova 1/2 (.09-.91)" in text


def test_a_control_with_another_reply_is_seen(report: ModuleType) -> None:
    rows = [full(0, True), row(0, True), row(0, True, server="tova", cached_tokens=0)]
    assert "| tova | 1 of 1 | 1 |" in render(report, rows)
    rows[-1]["reply"] = "8"
    assert "| tova | 0 of 1 | 1 |" in render(report, rows)


def test_no_rows_are_an_error(report: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no rows of seed 1"):
        render(report, [full(0, True)])
