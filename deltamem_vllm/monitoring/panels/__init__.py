# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The dashboard's rows, from what is asked first to what is asked last."""

from __future__ import annotations

from deltamem_vllm.monitoring.model import Panel, Query, Row
from deltamem_vllm.monitoring.panels.eviction import COST, EVICTION
from deltamem_vllm.monitoring.panels.glance import GLANCE
from deltamem_vllm.monitoring.panels.memory import MEMORY
from deltamem_vllm.monitoring.panels.traffic import TRAFFIC

ROWS: tuple[Row, ...] = (GLANCE, MEMORY, EVICTION, COST, TRAFFIC)


def panels() -> list[Panel]:
    """Return every panel, in order."""
    return [panel for row in ROWS for panel in row.panels]


def queries() -> list[Query]:
    """Return every query of every panel, in order."""
    return [query for panel in panels() for query in panel.queries]
