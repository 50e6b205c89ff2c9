# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a panel, a recording rule and an alert are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "heatmap", "table"]
Severity = Literal["critical", "warning"]

ENGINE_LABELS = "job, instance, model_name, engine"
"""What names one engine at Prometheus: vLLM's labels and those that Prometheus adds to each target."""

SERVER_LABELS = "job, instance, model_name"
"""What names a server in series that have no engine."""


@dataclass(frozen=True)
class Query:
    """One PromQL expression of a panel and the legend of its series (Grafana's `{{label}}` form)."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Threshold:
    """The value from which a panel's number is no longer fine.

    Parameters
    ----------
    value : float
        In the panel's unit.
    bad : {"above", "below"}
        On which side of it.
    """

    value: float
    bad: Literal["above", "below"] = "above"


@dataclass(frozen=True)
class Panel:
    """One panel of the dashboard, and its row in the guide.

    Parameters
    ----------
    title : str
        Unique in the dashboard.
    queries : tuple of Query
        What is drawn.
    unit : str
        Grafana's name of the unit: `bytes`, `s`, `percentunit` (1 is 100 %), `short`, `reqps`, `none`.
    description : str
        What the numbers mean.
    action : str
        What to do when they are not as they should be.
    threshold : Threshold or None
        Drawn as a line, or as the colour of a single number.
    kind : str
        How it is drawn.
    width : int
        Of the dashboard's 24 columns.
    stacked : bool
        Areas on top of each other: only for parts of one whole.
    """

    title: str
    queries: tuple[Query, ...]
    unit: str
    description: str
    action: str
    threshold: Threshold | None = None
    kind: Kind = "timeseries"
    width: int = 8
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class RecordingRule:
    """A series that Prometheus computes at every evaluation; `record` is named level:metric:operation."""

    record: str
    expr: str


@dataclass(frozen=True)
class Condition:
    """A value and when it is bad, kept apart so that the value can be asked for while nothing is wrong.

    Parameters
    ----------
    value : str
        PromQL without a comparison at its end.
    bad : str
        The comparison, e.g. `> 0.05`.
    """

    value: str
    bad: str


@dataclass(frozen=True)
class Alert:
    """One alert, and its section in the guide.

    Parameters
    ----------
    name : str
        CamelCase; the anchor of its section is its lower-case form.
    conditions : tuple of Condition
        All must hold for the same `labels`. The first one's value is what the message shows.
    labels : str
        Label names on which the conditions are matched, comma-separated.
    lasts : str
        Prometheus duration for which they must hold.
    severity : {"critical", "warning"}
        `critical`: requests fail now.
    summary, description : str
        Messages; Prometheus' templates are allowed.
    meaning, action : str
        The guide's section: what happened, and what to do.
    """

    name: str
    conditions: tuple[Condition, ...]
    lasts: str
    severity: Severity
    summary: str
    description: str
    meaning: str
    action: str
    labels: str = ENGINE_LABELS

    @property
    def expr(self) -> str:
        """The whole PromQL expression."""
        parts = [
            f"({condition.value}) {condition.bad}" if " " in condition.value else f"{condition.value} {condition.bad}"
            for condition in self.conditions
        ]
        return f"\nand on ({self.labels})\n".join(parts)

    @property
    def anchor(self) -> str:
        """Where its section starts in the guide."""
        return self.name.lower()
