# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem calibrate`: learn once how much memory each layer and kv head of a model deserves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from deltamem_vllm.calibration.artifact import Calibration


def calibrate(
    model: Annotated[str, typer.Argument(help="An embedded model's name, a local path or a Hugging Face id.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; deltamem's cache, where servers look, if not given."),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, max=64, help="Natural texts to average over.")] = 4,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of each text.")] = 2048,
    force: Annotated[bool, typer.Option("--force", help="Replace a calibration that is there.")] = False,
) -> None:
    """Let a model repeat natural texts and store which layers and heads look up how much."""
    from rich.console import Console

    from deltamem_vllm.calibration.errors import CalibrationError
    from deltamem_vllm.calibration.run import calibrate as run
    from deltamem_vllm.models.errors import ModelError

    try:
        made = run(model, out, texts=texts, tokens=tokens, force=force, report=_say)
    except (CalibrationError, ModelError) as error:
        _say(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        raise typer.Exit(130) from None
    Console().print(_shares(made))
    _say(f"took {made.card.details['duration_s']:.0f} s")
    _say(f"wrote {made.folder}")


def _shares(made: Calibration) -> Table:
    """Share of its entries that each layer keeps, and the least and most of its heads, at several keep ratios."""
    from rich.table import Table

    shares = made.card.details["shares"]
    caption = "% of its entries a layer keeps when the best of all stay; in parentheses its kv heads, least and most"
    table = Table("layer", *(f"best {float(ratio):.0%}" for ratio in shares), box=None, caption=caption)
    for layer in range(made.card.geometry.layers):
        cells = []
        for share in shares.values():
            mean, *heads = [100 * x for x in (share["layers"][layer], *share["heads"][layer])]
            cells.append(f"{mean:3.0f} ({min(heads):.0f}-{max(heads):.0f})")
        table.add_row(str(layer), *cells)
    return table


def _say(line: str) -> None:
    typer.echo(f"deltamem calibrate: {line}", err=True)
