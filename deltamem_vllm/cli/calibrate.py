# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem calibrate`: learn once how much memory each layer and kv head of a model deserves, and for what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltamem_vllm.calibration.options import SAMPLES, TARGET, TARGETS, TOKENS

if TYPE_CHECKING:
    from rich.table import Table

    from deltamem_vllm.calibration.artifact import Calibration


def calibrate(
    model: Annotated[str, typer.Argument(help="An embedded model's name, a local path or a Hugging Face id.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; deltamem's cache, where servers look, if not given."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=1024, help="Texts to learn from.")] = SAMPLES,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens of each text.")] = TOKENS,
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds of text, separated by commas, such as novel,log,code; all if not given."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="What an entry's worth is, the most attention it gets: "
            + "; ".join(f"{name}, {meaning}" for name, meaning in TARGETS.items())
            + "."
        ),
    ] = TARGET,
    seed: Annotated[int, typer.Option(min=0, help="Of the texts: another seed, other texts.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a calibration that is there.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew instead of going on where an interrupted run was.")
    ] = False,
) -> None:
    """Let a model read, repeat and use texts, and store what it looks up: by layer and head, and by keys and values."""
    from rich.console import Console

    from deltamem_vllm.calibration.corpus import KINDS
    from deltamem_vllm.calibration.errors import CalibrationError
    from deltamem_vllm.calibration.options import Options
    from deltamem_vllm.calibration.run import calibrate as run
    from deltamem_vllm.models.errors import ModelError

    chosen = KINDS if kinds is None else tuple(kind.strip() for kind in kinds.split(","))
    try:
        options = Options(samples, tokens, chosen, target, seed)
        made = run(model, out, options, force=force, restart=restart, report=_say)
    except (CalibrationError, ModelError) as error:
        _say(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on after the last text that was done, --restart begins anew")
        raise typer.Exit(130) from None
    Console().print(_shares(made))
    Console().print(_held_out(made.card.details["metrics"]))
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


def _held_out(metrics: dict[str, Any]) -> Table:
    """How well the predictor does on texts that it has not learned from, by family."""
    from rich.table import Table

    mean = metrics["predictor_held_out"]
    caption = "texts held out; % of the worth that stays by the predictor, by the worth itself, at random"
    ratios = [f"kept in {float(ratio):.0%}" for ratio in mean["kept"]]
    table = Table("text", "R2", "in a head", "Spearman", *ratios, box=None, caption=caption)
    for name, row in (*metrics["predictor_held_out_by_family"].items(), ("mean", mean)):
        numbers = [_number(row[entry], 2) for entry in ("r2", "r2_within_heads", "spearman")]
        kept = (" ".join(_number(share, 0, 100) for share in shares.values()) for shares in row["kept"].values())
        table.add_row(name, *numbers, *kept)
    return table


def _number(value: float | None, places: int, factor: int = 1) -> str:
    return "-" if value is None else f"{factor * value:.{places}f}"


def _say(line: str) -> None:
    typer.echo(f"deltamem calibrate: {line}", err=True)
