# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Reverses the order in which model runner V2 applies a step's block-table writes.

On a GPU one kernel program does each staged write and nothing orders the programs; Triton's interpreter runs them
first to last, which hides any dependence on the order.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any


def reverse_block_table_writes(runner: Any, events: Counter[str]) -> None:
    """Last write first, from now on.

    ``events`` counts "reversed_writes" (steps with two writes or more) and "overlapping_writes" (steps with two
    writes to the same cell, whose outcome would be undefined).
    """
    for table in runner.block_tables.block_tables:
        _reverse(table, events)


def _reverse(table: Any, events: Counter[str]) -> None:
    stock = table.apply_write

    def apply_write() -> None:
        ends = [0, *table._staged_write_cu_lens]
        contents = [table._staged_write_contents[a:b] for a, b in pairwise(ends)]
        writes = list(zip(table._staged_write_indices, table._staged_write_starts, contents, strict=True))
        cells = [(row, start + i) for row, start, blocks in writes for i in range(len(blocks))]
        events["reversed_writes"] += len(writes) > 1
        events["overlapping_writes"] += len(set(cells)) < len(cells)
        table.clear_staged_writes()
        for row, start, blocks in reversed(writes):
            table.stage_write(row, start, blocks)
        stock()

    table.apply_write = apply_write
