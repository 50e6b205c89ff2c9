# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A plan as tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from deltamem_vllm.evaluation.plan.capacity import Load
from deltamem_vllm.evaluation.plan.notes import commands, in_gib, notes, short_context, verdict
from deltamem_vllm.evaluation.plan.planner import Offload, Plan, Row

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_plan(plan: Plan, console: Console) -> None:
    """Print the tables, what they rest on, and the commands."""
    for line in _head(plan):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_weights_table(plan))
    console.print(_rows_table(plan))
    if plan.offloads:
        console.print(_offload_table(plan))
    for line in [*verdict(plan), "", *notes(plan), *commands(plan)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _head(plan: Plan) -> list[str]:
    question, geometry = plan.question, plan.question.geometry
    serving = question.serving
    cards = f"{serving.ranks} x {question.device.title}" if serving.ranks > 1 else question.device.title
    each = " each" if serving.ranks > 1 else ""
    budget = question.device.gib * serving.utilization
    size = "(an estimate)" if question.device.estimated else "as CUDA reports it"
    return [
        f"{geometry.name}: {geometry.parameter_count:,} parameters ({geometry.source})",
        (
            f"  {geometry.layers} layers, {geometry.query_heads} query and {geometry.kv_heads} KV heads of "
            f"{geometry.head_size}, {geometry.max_positions:,} positions, {geometry.token_bytes(2, 1) / 1024:g} KiB of "
            "16-bit KV a token"
        ),
        f"{cards}: {question.device.gib:g} GiB{each} {size}",
        (
            f"  --gpu-memory-utilization {serving.utilization:g} makes {budget:.2f} GiB of it; batches of "
            f"{serving.batch_tokens} tokens"
        ),
        "",
    ]


def _weights_table(plan: Plan) -> Table:
    geometry, ranks = plan.question.geometry, plan.question.serving.ranks
    table = _table(f"Weights{' on each card' if ranks > 1 else ''} (exact)")
    for name in ("format", "what", "bits", "GiB", "of it 16-bit"):
        table.add_column(name, justify="left" if name in ("format", "what") else "right")
    for form in plan.question.formats:
        kept = sum(p.rank_bytes(form, geometry, ranks) for p in geometry.parameters if p.kind != "matrix")
        total = geometry.weight_bytes(form, ranks)
        bits = f"{form.effective_bits:.4g}"
        table.add_row(form.name, form.summary, bits, in_gib(total), in_gib(total if form.bits == 16 else kept))
    return table


def _rows_table(plan: Plan) -> Table:
    table = _table("Requests held at once, by context (prompt + output); GiB of one card")
    for name in ("weights", "KV cache"):
        table.add_column(name)
    for name in ("slots", "deltamem", "estimated", "KV pool", "pool tokens", "longest"):
        table.add_column(name, justify="right")
    for context in plan.question.contexts:
        table.add_column(short_context(context), justify="right")
    for form in plan.question.formats:
        rows = plan.rows_of(form)
        if all(not row.pool.usable for row in rows):  # one line says it for all treatments
            best = max(rows, key=lambda row: row.memory.pool)
            lacks = f"short by {in_gib(-best.memory.pool)}" if best.memory.pool < 0 else "no block"
            table.add_row(form.name, "any", "", "", in_gib(best.memory.estimated), lacks)
        else:
            for i, row in enumerate(rows):
                table.add_row(form.name if i == 0 else "", *_row_cells(plan, row))
        table.add_section()
    return table


def _row_cells(plan: Plan, row: Row) -> list[str]:
    memory = row.memory
    own = in_gib(memory.window + memory.tables) if row.treatment.budget else ""
    slots = str(row.serving.max_num_seqs)
    cells = [row.treatment.name, slots, own, in_gib(memory.estimated), in_gib(max(0, memory.pool))]
    return [*cells, f"{row.pool.tokens:,}", _longest(plan, row), *(_load(load) for load in row.loads)]


def _offload_table(plan: Plan) -> Table:
    table = _table(
        "CPU offload for one request: --cpu-offload-gb of each card, and the most tokens a second (estimated: "
        f"{plan.question.device.host_gb_per_s:g} GB/s from the host)"
    )
    table.add_column("weights")
    table.add_column("context", justify="right")
    for treatment in plan.question.treatments:
        table.add_column(treatment.name, justify="right")
    found = {(o.form.name, o.context, o.treatment.name): o for o in plan.offloads}
    for form in dict.fromkeys(o.form.name for o in plan.offloads):
        for context in plan.question.contexts:
            offloads = [found[form, context, t.name] for t in plan.question.treatments]
            table.add_row(form, short_context(context), *(_offload_cell(o) for o in offloads))
        table.add_section()
    return table


def _offload_cell(offload: Offload) -> str:
    if not math.isfinite(offload.gib):
        return "too much"
    return f"{offload.gib:g}: {offload.tokens_per_second:.2g}/s"


def _load(load: Load) -> str:
    if not load.requests:
        return "-"
    return f"{load.requests}{'+' if load.limited else ''}{'*' if load.compacted_while_read else ''}"


def _longest(plan: Plan, row: Row) -> str:
    at_limit = row.longest == plan.question.geometry.max_positions
    return f"{row.longest:,}{' (model)' if at_limit else ''}"


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
