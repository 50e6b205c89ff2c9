# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How many series deltamem adds, so that nobody finds out from Prometheus' memory.

No label holds anything of a request. Label values are reasons and tiers, a handful that the code names.
"""

from __future__ import annotations

from collections.abc import Iterable

from deltamem_vllm.telemetry import METRICS, Metric


def series(row: Metric) -> int:
    """Count one row's series, with the label values that exist from the start."""
    # A histogram's buckets are counted up to each bound and up to infinity, and it has a sum and a count.
    each = len(row.buckets) + 3 if row.kind == "histogram" else 1
    return each * (1 if row.label is None else len(row.initial))


def series_per_engine(metrics: Iterable[Metric] = METRICS) -> int:
    """Count the series of one engine, `deltamem_policy_info` among them."""
    return 1 + sum(series(row) for row in metrics if row.side == "engine")


def series_per_server(metrics: Iterable[Metric] = METRICS) -> int:
    """Count the series that a server has once, however many engines it has."""
    return sum(series(row) for row in metrics if row.side == "api_server")
