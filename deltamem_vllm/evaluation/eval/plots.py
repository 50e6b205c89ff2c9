# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The pictures of `deltamem eval`, as PNG files."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from deltamem_vllm.evaluation.eval.curves import Panel, curves, position_curves, text_panels
from deltamem_vllm.evaluation.eval.heat_maps import depth_map, tasks_map
from deltamem_vllm.evaluation.eval.tables import EvalTable, Group
from deltamem_vllm.evaluation.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 110


class PlotsUnavailable(RuntimeError):
    """matplotlib is not installed."""


def check_plots() -> None:
    """Raise `PlotsUnavailable` without matplotlib; asked before hours of measuring."""
    if find_spec("matplotlib") is None:
        raise PlotsUnavailable("drawing plots needs matplotlib; install it: pip install 'deltamem-vllm[plots]'")


def write_plots(folder: Path, results: Results, run: str) -> list[Path]:
    """Draw what the run's rows allow and return the PNG files, in the order to show them.

    Raises
    ------
    NothingMeasured
        If the results have no such run.
    PlotsUnavailable
        Without matplotlib, which nothing else of deltamem needs.
    """
    check_plots()
    import matplotlib

    matplotlib.use("Agg")
    table = EvalTable(results, run)
    asked, pooled = (_panels(table, groups) for groups in (table.asked_groups, table.pooled_groups))
    figures: dict[str, Figure | None] = {
        "retention": curves(table, asked, lambda a: a.retention, "retention", "full is 1"),
        "logprob_drop": curves(table, pooled, lambda a: a.drop, "log-prob lost, nats per token", "full is 0"),
        "kl": curves(table, text_panels(table), lambda a: a.kl, "KL to the full cache, nats", "logarithmic"),
        "kl_by_position": position_curves(table),
    }
    for length in table.lengths:
        figures[f"tasks_{length}"] = tasks_map(table, length)
    figures["depth"] = depth_map(table)
    return [_save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure is not None]


def _panels(table: EvalTable, groups: Callable[[int, str], list[Group]]) -> list[list[Panel]]:
    """A row for each setting, a panel for each length."""
    return [
        [Panel(f"{setting}, {length} tokens", length, groups(length, setting)) for length in table.lengths]
        for setting in table.settings
    ]


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
