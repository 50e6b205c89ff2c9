# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What `scripts/monitoring.py --check` finds wrong, as sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from deltamem_vllm.monitoring.model import Alert, Query, RecordingRule
from deltamem_vllm.monitoring.names import allowed, series_names, used
from deltamem_vllm.telemetry import Metric


def undefined(
    queries: Iterable[Query], recording: Sequence[RecordingRule], alerts: Iterable[Alert], metrics: Sequence[Metric]
) -> list[str]:
    """Find names in expressions that no table defines.

    Panels and recording rules read what servers export; alerts may read recorded series, too. Panels may not: a
    dashboard must work where the rules are not loaded.
    """
    exported = allowed(metrics)
    recorded = exported | {rule.record for rule in recording}
    expressions = [
        *((f"a panel's query {query.expr!r}", query.expr, exported) for query in queries),
        *((f"recording rule {rule.record}", rule.expr, exported) for rule in recording),
        *((f"alert {alert.name}", alert.expr, recorded) for alert in alerts),
    ]
    return [
        f"{where} uses {name}, which is neither in telemetry.METRICS nor in monitoring/names.py; "
        "correct the name or add the row"
        for where, expr, known in expressions
        for name in sorted(used(expr) - known)
    ]


def unshown(queries: Iterable[Query], guide: str, reference: str, metrics: Iterable[Metric]) -> list[str]:
    """Find rows of the table that the reference does not list, or that neither a panel nor the guide shows."""
    drawn = {name for query in queries for name in used(query.expr)}
    problems = []
    for row in metrics:
        if f"`{row.public_name}`" not in reference:
            problems.append(f"{row.public_name} is not in docs/reference/metrics.md; run scripts/metrics_reference.py")
        if drawn.isdisjoint(series_names(row)) and f"`{row.public_name}`" not in guide:
            problems.append(
                f"{row.public_name} is in no panel and not in docs/guides/monitoring.md; "
                "draw it (deltamem_vllm/monitoring/panels) or say there why not"
            )
    return problems


def untested(alerts: Iterable[Alert], tests: str) -> list[str]:
    """Find alerts that promtool's tests do not know."""
    return [
        f"alert {alert.name} is not in docker/prometheus/alert-rules.test.yml; add a case in which it fires"
        for alert in alerts
        if f"alertname: {alert.name}\n" not in tests
    ]


def stale(wanted: Mapping[str, str], found: Mapping[str, str | None]) -> list[str]:
    """Find generated files that are missing or not what would be written now."""
    return [
        f"{path} is {'missing' if found[path] is None else 'stale'}; run scripts/monitoring.py"
        for path, text in wanted.items()
        if found[path] != text
    ]
