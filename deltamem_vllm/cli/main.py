# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Entry point of the `deltamem` command: puts the subcommands together.

A subcommand is a module of this package with a typer app or function in it, and one line below. Those
modules import torch, transformers and the like inside their functions, so that `deltamem --help` answers
at once; a test holds this module to it.
"""

from __future__ import annotations

from typing import Annotated

import typer

from deltamem_vllm.cli import bench, calibrate, codec, dashboard, doctor, model, plan, profile, scorers, top
from deltamem_vllm.cli import eval as eval_

app = typer.Typer(
    name="deltamem",
    help="Work with deltamem, the KV cache policy for vLLM. Servers are started by vLLM itself: "
    "vllm serve MODEL --kv-cache-policy deltamem",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Plain tracebacks: the pretty ones print every local, prompts included.
    pretty_exceptions_enable=False,
)

app.add_typer(model.app, name="model")
app.command(name="scorers")(scorers.scorers)
app.command(name="eval")(eval_.evaluate)
app.command(name="bench")(bench.bench)
app.command(name="profile")(profile.profile)
app.command(name="plan")(plan.plan)
app.command(name="calibrate")(calibrate.calibrate)
app.command(name="codec")(codec.codec)
app.command(name="dashboard")(dashboard.dashboard)
app.command(name="top")(top.top)
app.command(name="doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from deltamem_vllm import __version__

        typer.echo(f"deltamem {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    # The callback's docstring would replace the help text above, and the option acts on its own.
    del version
