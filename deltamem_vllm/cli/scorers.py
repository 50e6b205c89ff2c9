# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem scorers`: which scorers can be named in the configuration."""

from __future__ import annotations

import typer


def scorers() -> None:
    """List the scorers: built-in ones and those of other packages (entry points `deltamem.scorers`)."""
    from rich.console import Console
    from rich.table import Table

    from deltamem_vllm.scoring.registry import describe_scorers

    try:
        found = describe_scorers()
    except ValueError as error:
        # Two packages claim one name; the registry's message says which and what to do.
        typer.echo(f"deltamem: {error}", err=True)
        raise typer.Exit(1) from error
    table = Table("name", "what it keeps", "source", "needs queries", box=None)
    for info in found:
        if info.error is None:
            table.add_row(info.name, info.summary, info.source, "yes" if info.needs_queries else "no")
        else:
            table.add_row(info.name, f"cannot be used: {info.error}", info.path, "?")
    Console().print(table)
