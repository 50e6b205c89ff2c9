# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which metric names an expression uses, and which exist."""

from __future__ import annotations

import pytest

from deltamem_vllm.monitoring import names
from deltamem_vllm.monitoring.alerts import ALERTS
from deltamem_vllm.monitoring.cardinality import series_per_engine, series_per_server
from deltamem_vllm.monitoring.names import allowed, used
from deltamem_vllm.monitoring.panels import queries
from deltamem_vllm.monitoring.recording import RECORDING
from deltamem_vllm.telemetry import Metric

CASES = {
    "up": {"up"},
    'sum by (le, engine) (rate(a_bucket{engine=~"$engine", le!="b"}[$__rate_interval]))': {"a_bucket"},
    "sum(rate(vllm:x_total[5m])) by (model_name) / ignoring(tier) group_left (b) c": {"vllm:x_total", "c"},
    "histogram_quantile(0.5, sum by (le) (increase(h_bucket[1h:30s] offset 5m)))": {"h_bucket"},
    "a and on (job, instance) b unless c or d": {"a", "b", "c", "d"},
    'a{text="by (x) \\" and {up}"} > bool 1e-6': {"a"},
    "a == +Inf or b == NaN or rate (d[5m]) * 0.5e3": {"a", "b", "d"},
    'count({__name__=~"deltamem_.*"})': {"__name__"},
    "andy + orange + by_tier": {"andy", "orange", "by_tier"},
}


@pytest.mark.parametrize("expr", CASES)
def test_metric_names_are_told_from_functions_labels_and_numbers(expr: str) -> None:
    assert used(expr) == CASES[expr]


def test_a_histogram_is_known_by_its_three_series_and_not_by_its_own_name() -> None:
    rows = (
        Metric("h", "h", "histogram", "A histogram.", buckets=(0.5, 1.0)),
        Metric("c", "c", "counter", "A counter.", label="reason", initial=("a", "b")),
        Metric("s", "s", "counter", "A server's.", side="api_server"),
    )
    ours = {name for name in allowed(rows) if name.startswith("deltamem_")}
    assert ours == {
        "deltamem_policy_info",
        "deltamem_h_bucket",
        "deltamem_h_sum",
        "deltamem_h_count",
        "deltamem_c_total",
        "deltamem_s_total",
    }
    # Two bounds, infinity, sum and count; two reasons; the policy's info.
    assert series_per_engine(rows) == 5 + 2 + 1
    assert series_per_server(rows) == 1


def test_no_name_of_vllms_is_listed_that_nothing_uses() -> None:
    expressions = [query.expr for query in queries()]
    expressions += [rule.expr for rule in RECORDING] + [alert.expr for alert in ALERTS]
    asked = frozenset().union(*map(used, expressions))
    assert set(names.VLLM_METRICS) <= asked
    assert len(asked) > 30, "the scan finds next to nothing"
