# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A small grid of `deltamem eval` for tests that need one."""

from __future__ import annotations

from typing import Any

from deltamem_vllm.evaluation.eval.grid import Grid, parse_grid

DOCUMENT: dict[str, Any] = {
    "name": "toy",
    "tasks": ["niah-single", "common-words", "continuation"],
    "lengths": {512: 2, 1024: 1},
    "settings": ["aware", "agnostic", "two-turn"],
    "policies": ["tova"],
    "budgets": [0.5, 0.1],
    "continuation_tokens": 16,
}


def grid(**changes: Any) -> Grid:
    return parse_grid({**DOCUMENT, **changes}, "toy.yaml")
