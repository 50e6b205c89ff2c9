# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem plan`: which context length and how many requests fit a card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from deltamem_vllm.evaluation.plan.catalog import Device
    from deltamem_vllm.evaluation.plan.formats import WeightFormat
    from deltamem_vllm.evaluation.plan.memory import Serving
    from deltamem_vllm.evaluation.plan.planner import Plan


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with a config.json, an embedded model, a shipped geometry (--list) or a Hugging Face id.",
            show_default=False,
        ),
    ] = "",
    device: Annotated[str | None, typer.Option(help="The card, by name (see --list).")] = None,
    gib: Annotated[float | None, typer.Option(help="A card of this many GiB, as CUDA reports them.")] = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="Cards of that kind: tensor-parallel ranks.")] = 1,
    context: Annotated[
        list[str] | None,
        typer.Option(help="Tokens of prompt and output, such as 8192 or 8k. May be repeated. [4k, 8k, 32k, 128k]"),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="bf16, fp8, int8, int4, int3 or int2. May be repeated. [down to int4; below that if int4 does not fit]"
        ),
    ] = None,
    keep_ratio: Annotated[
        list[float] | None, typer.Option(help="deltamem's keep_ratio. May be repeated. [0.5, 0.25, 0.1]")
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of the card for the server. [vLLM's default, 0.92]")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Slots of a batch. [the number that holds most requests]")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a batch. [vLLM's default for the card]")
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV cache block.")] = 16,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="No CUDA graphs.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Everything as JSON, with a command for each cell.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List shipped geometries and cards, and stop.")] = False,
) -> None:
    """Say which context lengths and how many requests fit a card, and with which vLLM flags."""
    from rich.console import Console

    from deltamem_vllm.config import ConfigError
    from deltamem_vllm.evaluation.plan.catalog import find_device
    from deltamem_vllm.evaluation.plan.errors import PlanError
    from deltamem_vllm.evaluation.plan.formats import choose_formats
    from deltamem_vllm.evaluation.plan.memory import GPU_MEMORY_UTILIZATION, Serving
    from deltamem_vllm.models.errors import ModelError

    # Without a terminal (a file, a pipe) rich would break the tables at 80 columns.
    console = Console(width=None if Console().is_terminal else 140)
    if list_:
        _list(console)
        return
    try:
        if not model:
            raise PlanError("name a model; deltamem plan --list shows those that need no network")
        card = find_device(device, gib)
        forms = choose_formats(weights) if weights else None
        ratios = keep_ratio or [0.5, 0.25, 0.1]
        utilization = GPU_MEMORY_UTILIZATION if gpu_memory_utilization is None else gpu_memory_utilization
        if not 0 < utilization <= 1:
            raise PlanError(f"--gpu-memory-utilization: got {utilization}, allowed: > 0 and <= 1")
        serving = Serving(ranks=count, utilization=utilization, block_size=block_size, eager=enforce_eager)
        answer = _answer(model, card, forms, ratios, context, serving, max_num_seqs, max_num_batched_tokens)
    except (PlanError, ConfigError, ModelError) as error:
        typer.echo(f"deltamem plan: {error}", err=True)
        raise typer.Exit(1) from error
    if json_:
        from deltamem_vllm.evaluation.plan.as_json import to_json

        typer.echo(json.dumps(to_json(answer), indent=1))
    else:
        from deltamem_vllm.evaluation.plan.report import print_plan

        print_plan(answer, console)


def _answer(
    model: str,
    card: Device,
    forms: list[WeightFormat] | None,
    ratios: list[float],
    context: list[str] | None,
    serving: Serving,
    max_num_seqs: int | None,
    batch_tokens: int | None,
) -> Plan:
    from deltamem_vllm.config import DeltaMemConfig
    from deltamem_vllm.evaluation.plan.capacity import parse_context
    from deltamem_vllm.evaluation.plan.formats import FORMATS
    from deltamem_vllm.evaluation.plan.geometry import load_geometry
    from deltamem_vllm.evaluation.plan.planner import choose_contexts, make_plan, make_question, make_treatments
    from deltamem_vllm.scoring.registry import load_scorer

    asked = [parse_context(text) for text in context] if context else None
    config = DeltaMemConfig.from_dict({})
    for ratio in ratios:
        DeltaMemConfig.from_dict({"keep_ratio": ratio})
    treatments = make_treatments(config, sorted(set(ratios), reverse=True))
    # The default scorer decides whether there is an observation window, and thereby how large the pool is.
    # As if the model had a calibration of today: nothing is looked up here.
    scorer = config.resolved("a calibration", predictor=True).scorer
    window = load_scorer(scorer).observed(config.window)
    geometry = load_geometry(model)
    contexts = choose_contexts(asked, geometry.max_positions)

    def ask(wanted: list[WeightFormat]) -> Plan:
        question = make_question(
            geometry, card, contexts, wanted, treatments, window, serving, max_num_seqs, batch_tokens
        )
        return make_plan(question)

    if forms is not None:
        return ask(forms)
    usual = [form for form in FORMATS.values() if form.bits >= 4]
    answer = ask(usual)
    return answer if answer.fits(usual[-1]) else ask(list(FORMATS.values()))


def _list(console: Console) -> None:
    from rich.table import Table

    from deltamem_vllm.evaluation.plan.catalog import known_devices, known_models

    models = Table("model", "Hugging Face ids with these sizes", box=None)
    for known in known_models().values():
        models.add_row(known.name, ", ".join(known.ids))
    devices = Table("--device", "card", "GiB as CUDA reports them", box=None)
    for device in known_devices().values():
        devices.add_row(device.name, device.title, f"{device.gib:g}")
    console.print(models, "", devices)
