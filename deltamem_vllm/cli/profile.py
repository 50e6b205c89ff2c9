# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem profile`: what the policy does with one prompt, token by token and layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deltamem_vllm.evaluation.profile.document import Profile


def profile(
    text: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with the prompt.")] = None,
    length: Annotated[
        int, typer.Option(min=1, help="Tokens of the built-in prompt, a needle in a long text, if no other is given.")
    ] = 2048,
    mark: Annotated[
        list[str] | None, typer.Option(help="A passage of your prompt to follow. May be given several times.")
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Send the prompt as a user's message in the model's chat template, if it has one.")
    ] = True,
    model: Annotated[
        str, typer.Option(help="An embedded model's name, a Hugging Face id or a local path.")
    ] = "smollm2",
    scorer: Annotated[
        str, typer.Option(help="Which tokens matter; see `deltamem scorers`. auto is what a server would take.")
    ] = "auto",
    keep_ratio: Annotated[float, typer.Option(help="Share of the memory that stays, > 0 and <= 1.")] = 0.1,
    dealing: Annotated[
        str,
        typer.Option(
            help="How layers and heads share what stays: global (by utility and calibration), profile (by the "
            "calibration alone) or equal."
        ),
    ] = "global",
    deltamem_config: Annotated[
        str, typer.Option(help="Further fields of the policy as JSON, as for `vllm serve`.")
    ] = "{}",
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of the prompt per engine step.")] = 512,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens per block of the KV cache.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the built-in prompt and of the policy.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for profile.json and the pictures.")] = Path("build/profile"),
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Draw an earlier run's profile.json again, without an engine or a model."),
    ] = None,
) -> None:
    """Show what one prompt's KV memory is worth: utility, what stays exact or coded, bytes over time, shares."""
    from deltamem_vllm.evaluation.child import ChildFailed
    from deltamem_vllm.evaluation.profile.build import Settings, policy_of
    from deltamem_vllm.evaluation.profile.document import read_profile, write_profile
    from deltamem_vllm.evaluation.profile.errors import ProfileError
    from deltamem_vllm.evaluation.profile.prompt import Wanted
    from deltamem_vllm.evaluation.profile.run import parse_fields, run_profile
    from deltamem_vllm.models.errors import ModelError

    try:
        if from_ is not None:
            if text is not None or prompt_file is not None:
                raise ProfileError("--from draws an earlier run and takes no prompt; drop --from, or the prompt")
            made = read_profile(from_)
        else:
            policy = policy_of(
                {
                    **parse_fields(deltamem_config),
                    "scorer": scorer,
                    "keep_ratio": keep_ratio,
                    "dealing": dealing,
                    "seed": seed,
                }
            )
            wanted = Wanted(text, prompt_file, length, tuple(mark or ()), chat, seed)
            settings = Settings(model, output_tokens, chunk, block_size)
            made = run_profile(wanted, policy, settings, out / "engine.log", _say)
            write_profile(made, out / "profile.json")
            _say(f"wrote {out / 'profile.json'}")
        _show(made, out)
    except (ProfileError, ModelError, ChildFailed) as error:
        _say(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        raise typer.Exit(130) from None


def _show(made: Profile, out: Path) -> None:
    """Print the summary and draw the pictures."""
    from rich.console import Console

    from deltamem_vllm.evaluation.profile.errors import ProfileError
    from deltamem_vllm.evaluation.profile.summary import summary

    Console().print(summary(made))
    try:
        from deltamem_vllm.evaluation.profile.pictures.files import write_pictures
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ProfileError(
            "the pictures need matplotlib, which is not installed: pip install matplotlib, then draw them with "
            "`deltamem profile --from profile.json`"
        ) from error
    files = write_pictures(made, out)
    _say(f"drew {', '.join(file.name for file in files)} in {out}")


def _say(line: str) -> None:
    typer.echo(f"deltamem profile: {line}", err=True)
