# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What `deltamem eval` says to lengths, budgets and grids that mean nothing, before anything is measured."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from deltamem_vllm.cli.eval import evaluate


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budgets", "half"], "expected shares between 0 and 1 separated by commas, got 'half'"),
        (["--budgets", "0.5,1.5"], "as changed on the command line: budgets.1: Input should be less than 1"),
        (["--lengths", "2k"], "expected whole numbers separated by commas, got '2k'"),
        (["nothing"], "no grid 'nothing'; available: "),
    ],
)
def test_what_means_nothing_is_refused(arguments: list[str], said: str) -> None:
    app = typer.Typer()
    app.command()(evaluate)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert said in " ".join(result.output.replace("│", " ").split())
