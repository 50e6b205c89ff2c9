# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The generated parts of docs/guides/monitoring.md; the rest of that page is written by hand."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from deltamem_vllm.monitoring.cardinality import series_per_engine, series_per_server
from deltamem_vllm.monitoring.model import Alert, Panel, RecordingRule, Row
from deltamem_vllm.monitoring.names import used

_PART = re.compile(r"(<!-- generated: (\w+)\b[^>]*-->\n).*?(<!-- end -->)", re.DOTALL)


def parts(rows: Sequence[Row], recording: Sequence[RecordingRule], alerts: Sequence[Alert]) -> dict[str, str]:
    """Return the generated parts by name."""
    return {
        "panels": "\n".join(_row(row) for row in rows),
        "recording": _recording(recording),
        "alerts": "\n".join(_alert(alert) for alert in alerts),
        "series": f"- {series_per_engine()} for each engine\n- {series_per_server()} for each server\n",
    }


def fill(page: str, content: Mapping[str, str]) -> str:
    """Put the generated parts between their marks.

    Raises
    ------
    ValueError
        The page lacks a part's marks, or has marks of a part that is not made.
    """
    found = [match[2] for match in _PART.finditer(page)]
    if sorted(found) != sorted(content):
        raise ValueError(
            f"marks of generated parts: {', '.join(found) or 'none'}; needed: {', '.join(content)}, each once, "
            "as '<!-- generated: NAME, by scripts/monitoring.py. Do not edit. -->' and '<!-- end -->'"
        )
    return _PART.sub(lambda match: f"{match[1]}\n{content[match[2]]}\n{match[3]}", page)


def _row(row: Row) -> str:
    lines = [f"### {row.title}\n\n| panel | meaning | what to do |\n| --- | --- | --- |\n"]
    lines += [f"| **{panel.title}** | {panel.description} {_bound(panel)}| {panel.action} |\n" for panel in row.panels]
    return "".join(lines)


def _bound(panel: Panel) -> str:
    if panel.threshold is None:
        return ""
    value = f"{panel.threshold.value:.0%}" if panel.unit == "percentunit" else f"{panel.threshold.value:g}"
    return f"Red {'from' if panel.threshold.bad == 'above' else 'below'} {value}. "


def _recording(rules: Sequence[RecordingRule]) -> str:
    lines = ["| series | from |\n| --- | --- |\n"]
    for rule in rules:
        sources = ", ".join(f"`{name}`" for name in sorted(used(rule.expr)))
        lines.append(f"| `{rule.record}` | {sources} |\n")
    return "".join(lines)


def _alert(alert: Alert) -> str:
    meaning = _wrapped(f"*{alert.severity}, after {alert.lasts}.* {alert.meaning}")
    return f"### {alert.name}\n\n{meaning}\n\n{_wrapped(f'**What to do.** {alert.action}')}\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
