# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem codec`: what coding cold tokens loses, by reference and number of bits, on a model's own activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deltamem_vllm.evaluation.codec.results import Measured


def codec(
    model: Annotated[str, typer.Argument(help="An embedded model's name, a local path or a Hugging Face id.")],
    tokens: Annotated[int, typer.Option(help="Tokens of each text that is coded.")] = 1024,
    texts: Annotated[int, typer.Option(help="Held-out texts to measure with.")] = 4,
    continuation: Annotated[int, typer.Option(help="Tokens after each text whose probabilities are compared.")] = 64,
    bits: Annotated[str, typer.Option(help="Bits of a code, 2 to 8, separated by commas.")] = "8,4,3,2",
    page_tokens: Annotated[
        str,
        typer.Option(help="Tokens of vLLM's blocks, separated by commas: they decide the bytes of a page."),
    ] = "32",
    references: Annotated[
        str,
        typer.Option(help="What differences are taken from: none, page, token, layer; separated by commas."),
    ] = "none,page,token,layer",
    fit_texts: Annotated[int, typer.Option(help="Texts of calibrations to fit the maps between layers on.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the texts: another seed, other texts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for codec.json and codec.md.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
) -> None:
    """Print error and bytes of every way to code cold tokens, and what the model's continuations lose by it."""
    from rich.console import Console

    from deltamem_vllm.calibration.errors import CalibrationError
    from deltamem_vllm.evaluation.codec.errors import CodecError
    from deltamem_vllm.evaluation.codec.settings import Settings, parse_names, parse_numbers
    from deltamem_vllm.models.errors import ModelError

    try:
        settings = Settings(
            tokens,
            texts,
            continuation,
            parse_numbers("bits", bits),
            parse_numbers("page_tokens", page_tokens),
            parse_names(references),
            fit_texts,
            seed,
        )
        if out is not None and out.exists() and not out.is_dir():
            raise CodecError(f"--out: {out} is no folder; give one, or a name that is free")
        # After the settings were checked: torch and transformers take seconds to load.
        from deltamem_vllm.evaluation.codec.run import measure

        found = measure(model, settings, _say)
    except (CodecError, CalibrationError, ModelError) as error:
        _say(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        raise typer.Exit(130) from None
    if json_:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        from deltamem_vllm.evaluation.codec.report import print_report

        # Without a terminal (a file, a pipe) rich would break the tables at 80 columns.
        print_report(found, Console(width=None if Console().is_terminal else 140))
    if out is not None:
        _write(found, out)


def _write(found: Measured, out: Path) -> None:
    from deltamem_vllm.evaluation.codec.report import markdown
    from deltamem_vllm.evaluation.machine import command_line

    out.mkdir(parents=True, exist_ok=True)
    (out / "codec.json").write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
    (out / "codec.md").write_text(markdown(found, command_line()), encoding="utf-8")
    _say(f"wrote codec.json and codec.md in {out}")


def _say(line: str) -> None:
    typer.echo(f"deltamem codec: {line}", err=True)
