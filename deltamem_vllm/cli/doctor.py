# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem doctor`: what is wrong with this installation, and how to mend it."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Also look at a model: an embedded one's name, a path or a Hugging Face id.")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Also look at a running server, such as http://127.0.0.1:8000.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that a server is to be started on.")] = 8000,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Print a block to paste into a bug report; it has no secrets.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail, too.")] = False,
) -> None:
    """Check the installation and say how to mend what is wrong; status 1 if something does not work."""
    from rich.console import Console

    from deltamem_vllm.doctor import report as reports
    from deltamem_vllm.doctor.asked import Asked
    from deltamem_vllm.doctor.findings import passed
    from deltamem_vllm.doctor.privacy import Redactor
    from deltamem_vllm.doctor.run import examine

    if json_ and report:
        raise typer.BadParameter("--json and --report are two kinds of output; choose one")
    asked = Asked(model, url, port)
    redactor = Redactor(asked.environment)
    findings = reports.redacted(examine(asked), redactor)
    if json_:
        typer.echo(reports.as_json(findings, redactor, strict))
    elif report:
        typer.echo(reports.as_bug_report(findings, redactor))
    else:
        console = Console()
        # Without a terminal (a file, a pipe) rich would break the lines at 80 columns.
        wide = console if console.is_terminal else Console(width=160)
        wide.print(reports.as_table(findings))
        wide.print(f"\n{reports.summary(findings)}; `deltamem doctor --report` prints a block for a bug report")
    if not passed(findings, strict):
        raise typer.Exit(1)
