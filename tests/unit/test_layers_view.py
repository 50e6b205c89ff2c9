# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What each (layer, kv head) holds, from a worker's page tables."""

from __future__ import annotations

import pytest
import torch

from deltamem_vllm.dealing.cold_pages import ColdPages
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.integration.layers_view import tokens_by_pair

SIZE = 16


@pytest.fixture
def tables() -> PageTables:
    """Request r: 5 blocks in 2 layers of 2 heads were dealt as 17 hot pages and 3 cold ones, as compaction 7."""
    pool = PagePool(list(torch.zeros(2, 12, 2, SIZE, 8)))
    tables = PageTables(pool, max_rows=2, max_width=12, fixed=False, cold=True)
    counts = torch.tensor([[8, 1], [6, 2]])
    cold = ColdPages(
        counts=torch.tensor([[0, 1], [2, 0]]),
        pages=torch.tensor([[[0, 0], [3, 0]], [[4, 5], [0, 0]]], dtype=torch.int32),
        tokens=torch.tensor([[[0, 0], [40, 0]], [[48, 30], [0, 0]]]),
        scores=None,
    )
    tables.put("r", 7, 5, counts, torch.arange(17), cold=cold)
    return tables


def test_dealt_pages_and_the_tail_are_hot_and_coded_tokens_are_cold(tables: PageTables) -> None:
    written = 3
    view = tokens_by_pair(tables, (2, 2), "r", serial=7, resident=5 * SIZE + written)
    assert view["hot"] == [[8 * SIZE + 3.0, SIZE + 3.0], [6 * SIZE + 3.0, 2 * SIZE + 3.0]]
    assert view["cold"] == [[0.0, 40.0], [78.0, 0.0]]
    # A cold page takes the place of a hot one, so together they are what the scheduler counts.
    assert sum(map(sum, view["hot"])) + 3 * SIZE == 4 * (5 * SIZE + written)


def test_a_request_that_was_not_dealt_holds_the_same_everywhere(tables: PageTables) -> None:
    for known in (tables, None):
        view = tokens_by_pair(known, (2, 2), "other", serial=0, resident=50)
        assert view == {"hot": [[50.0, 50.0]] * 2, "cold": [[0.0, 0.0]] * 2}


@pytest.mark.parametrize(("name", "found"), [("r", "those of compaction 7"), ("other", "none")])
def test_pages_of_another_compaction_are_not_shown(tables: PageTables, name: str, found: str) -> None:
    with pytest.raises(RuntimeError, match=f"by compaction 8, but this worker knows {found}"):
        tokens_by_pair(tables, (2, 2), name, serial=8, resident=50)
