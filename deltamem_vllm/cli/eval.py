# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem eval`: what eviction costs in answers and in fidelity, at equal bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deltamem_vllm.evaluation.eval.grid import Grid


def evaluate(
    grid: Annotated[
        str, typer.Argument(help="Name of a grid of configs/eval (see --list) or path of a YAML file.")
    ] = "smollm2",
    model: Annotated[
        list[str] | None,
        typer.Option(help="An embedded model's name, a Hugging Face id or a local path; several times for several."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small part of the grid, as its file says.")] = False,
    out: Annotated[
        Path, typer.Option(help="Gets a folder for each model: eval.jsonl (every cell), eval.md and plots.")
    ] = Path("build/eval"),
    samples: Annotated[int | None, typer.Option(min=1, help="Samples of each task at every length.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Only these prompt lengths, as 2048,4096.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, as niah-single,facts.")] = None,
    policies: Annotated[
        str | None, typer.Option(help="Only these policies of the grid, or scorers, as tova,mine.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Only these shares of the full cache's bytes, as 0.5,0.1.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Engines side by side; one for each core of a CPU, one on a GPU.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write the report of the newest run in eval.jsonl again.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List grids and tasks and stop.")] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help="Ask an OpenAI endpoint instead, given its root with /v1. Only answers are judged then.",
            rich_help_panel="Endpoints",
        ),
    ] = None,
    name: Annotated[
        str, typer.Option(help="What to call the endpoint in the tables.", rich_help_panel="Endpoints")
    ] = "endpoint",
    served_model: Annotated[
        str | None, typer.Option(help="Name of the model there; asked if left out.", rich_help_panel="Endpoints")
    ] = None,
    extra_body: Annotated[
        str,
        typer.Option(
            help='Further fields of each request, as {"vllm_xargs": {"deltamem_keep_ratio": 0.25}}.',
            rich_help_panel="Endpoints",
        ),
    ] = "{}",
    concurrency: Annotated[int, typer.Option(min=1, help="Questions to ask at once.", rich_help_panel="Endpoints")] = 4,
) -> None:
    """Measure policies against the full cache. Run again after an interruption and it goes on where it stopped."""
    from deltamem_vllm.evaluation.eval.grid import GridError, find_grid, grid_files, load_grid, narrowed
    from deltamem_vllm.models.catalog import resolve_model
    from deltamem_vllm.models.errors import ModelError

    def say(line: str) -> None:
        typer.echo(f"deltamem eval: {line}", err=True)

    if list_:
        _list(grid_files())
        return
    if report_only:
        found = sorted(path.parent for path in out.glob("*/eval.jsonl"))
        if not found:
            say(f"no */eval.jsonl in {out}; measure first, or name another folder with --out")
            raise typer.Exit(1)
        for folder in found:
            _report_again(folder, say)
        return
    try:
        chosen = narrowed(
            load_grid(find_grid(grid), quick=quick),
            samples=samples,
            lengths=_numbers(lengths),
            tasks=_words(tasks),
            policies=_words(policies),
            budgets=_shares(budgets),
        )
        models = {one: resolve_model(one) for one in model or ["smollm2"]}
    except (GridError, ModelError) as error:
        say(str(error))
        raise typer.Exit(1) from error

    if url is not None:
        from deltamem_vllm.cli.eval_endpoint import ask_endpoint

        (name_and_path, *others) = models.items()
        if others:
            raise typer.BadParameter("one endpoint serves one model; give one", param_hint="--model")
        ask_endpoint(chosen, *name_and_path, out, say, url, name, served_model, extra_body, concurrency)
        return
    for one, path in models.items():
        _measure(chosen, one, path, out, workers or _default_workers(), say)


def _measure(grid: Grid, model: str, path: str, out: Path, workers: int, say: Callable[[str], None]) -> None:
    """Measure what is missing of one model and write its report."""
    # Only now: the error messages of the command line need none of it.
    from transformers import AutoTokenizer

    from deltamem_vllm.evaluation import machine
    from deltamem_vllm.evaluation.child import ChildFailed
    from deltamem_vllm.evaluation.eval.encode import EncodingError
    from deltamem_vllm.evaluation.eval.plan import planned_keys
    from deltamem_vllm.evaluation.eval.plots import PlotsUnavailable, check_plots, write_plots
    from deltamem_vllm.evaluation.eval.report import write_report
    from deltamem_vllm.evaluation.eval.run import DECISIVE, Evaluation, WindowCutShort
    from deltamem_vllm.evaluation.eval.tables import NothingMeasured
    from deltamem_vllm.evaluation.results import Results, ResultsDamaged

    # The evaluation forks no process after this; silences a warning per tokenizer call.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name = Path(model).name if Path(model).is_dir() else model
    conditions = {
        "model": name,
        "machine": machine.describe_machine(),
        "code": machine.describe_code(DECISIVE),
    }
    folder = out / name.replace("/", "--")
    try:
        check_plots()
        results = Results(folder / "eval.jsonl")
        evaluation = Evaluation(grid, path, AutoTokenizer.from_pretrained(path), conditions, results, folder, say)
        keys, command = planned_keys(grid), machine.command_line()

        def report(plots: Sequence[Path] = ()) -> None:
            write_report(folder / "eval.md", results, evaluation.run_id, command, plots, keys)

        evaluation.run(workers, report)
        report(write_plots(folder / "plots", results, evaluation.run_id))
    except (ChildFailed, EncodingError, NothingMeasured, PlotsUnavailable, ResultsDamaged, WindowCutShort) as error:
        say(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with what is missing")
        raise typer.Exit(130) from None
    say(f"report in {folder / 'eval.md'}")


def _report_again(folder: Path, say: Callable[[str], None]) -> None:
    from deltamem_vllm.evaluation.eval.grid import Grid
    from deltamem_vllm.evaluation.eval.plan import planned_keys
    from deltamem_vllm.evaluation.eval.plots import PlotsUnavailable, write_plots
    from deltamem_vllm.evaluation.eval.report import write_report
    from deltamem_vllm.evaluation.eval.tables import CONDITIONS, NothingMeasured
    from deltamem_vllm.evaluation.results import Results, ResultsDamaged

    try:
        results = Results(folder / "eval.jsonl")
        if not results.runs():
            raise NothingMeasured(f"{results.path} has no runs; measure first, or name another folder with --out")
        run = results.runs()[-1]
        conditions = results.cells(run)[CONDITIONS]
        plots = write_plots(folder / "plots", results, run)
        keys = planned_keys(Grid(**conditions["grid"]))
        write_report(folder / "eval.md", results, run, conditions["command"], plots, keys)
    except (NothingMeasured, PlotsUnavailable, ResultsDamaged) as error:
        say(str(error))
        raise typer.Exit(1) from error
    say(f"report in {folder / 'eval.md'}")


def _default_workers() -> int:
    import torch

    return 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))


def _words(given: str | None) -> list[str] | None:
    return None if given is None else [word.strip() for word in given.split(",") if word.strip()]


def _numbers(given: str | None) -> list[int] | None:
    words = _words(given)
    if words is None:
        return None
    bad = [word for word in words if not word.isdigit()]
    if bad:
        raise typer.BadParameter(f"expected whole numbers separated by commas, got {bad[0]!r}", param_hint="--lengths")
    return [int(word) for word in words]


def _shares(given: str | None) -> list[float] | None:
    words = _words(given)
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise typer.BadParameter(
            f"expected shares between 0 and 1 separated by commas, got {given!r}", param_hint="--budgets"
        ) from error


def _list(grids: dict[str, Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from deltamem_vllm.evaluation.eval.grid import load_grid
    from deltamem_vllm.evaluation.tasks import TASKS

    table = Table("grid", "tasks", "lengths: samples of each task", box=None)
    for name, path in grids.items():
        grid = load_grid(path)
        table.add_row(name, str(len(grid.tasks)), ", ".join(f"{n}: {count}" for n, count in grid.lengths.items()))
    Console().print(table)
    table = Table("task", "what is asked", "source", box=None)
    for info in TASKS.values():
        table.add_row(info.name, info.summary, info.source)
    Console().print(table)
