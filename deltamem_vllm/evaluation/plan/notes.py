# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The sentences around the tables: what does not fit and what would, how to read the figures, and the commands."""

from __future__ import annotations

import math

from deltamem_vllm.evaluation.plan.catalog import GIB
from deltamem_vllm.evaluation.plan.commands import CHECKPOINT, serve_command
from deltamem_vllm.evaluation.plan.formats import WeightFormat
from deltamem_vllm.evaluation.plan.memory import table_bytes
from deltamem_vllm.evaluation.plan.planner import CARD_COUNTS, Offload, Plan


def verdict(plan: Plan) -> list[str]:
    """What to do about formats that do not serve even the shortest context."""
    question = plan.question
    shortest = short_context(question.contexts[0])
    lines = []
    for form in question.formats:
        if plan.fits(form):
            continue
        row = max(plan.rows_of(form), key=lambda r: r.longest)
        if row.longest:
            what = f"at most {row.longest:,} tokens with {row.treatment.name}"
        else:
            what = f"short by {in_gib(max(0, -max(r.memory.pool for r in plan.rows_of(form))))} GiB before any KV"
        cards = plan.cards_needed[form.name]
        more = f"needs --count {cards}" if cards else f"not even {CARD_COUNTS[-1]} of these cards"
        lines.append(f"{form.name} does not serve {shortest}: {what}; {more}.")
    served = [form.name for form in question.formats if plan.fits(form)]
    if not served:
        lines.append("No format asked for fits. Take more cards, a larger card, fewer bits, or offload as above.")
    elif lines:
        lines.append(f"Served here: {', '.join(served)}.")
    return lines


def notes(plan: Plan) -> list[str]:
    """What a reader of the tables has to know."""
    question = plan.question
    loads = [load for row in plan.rows for load in row.loads]
    slots = "as given" if question.fixed_seqs else "the power of two that holds most requests of the shortest context"
    lines = [
        (
            'Weights, KV bytes and blocks are exact; "estimated" is activations, CUDA graphs and libraries by the '
            'formulas in docs/guides/plan.md. vLLM logs its own figure as "Available KV cache memory".'
        ),
        f'"slots" is --max-num-seqs: {slots}.',
    ]
    if any(row.treatment.budget for row in plan.rows):
        lines.append(
            "deltamem here keeps tokens in the hot tier only; this version has no cold and no host tier. What a keep "
            "ratio costs in quality is measured in docs/results: read it before choosing one."
        )
        lines.append(
            "Counts are those of a pool that is full. Mode pressure, the default, evicts nothing before that; "
            "--deltamem-config.mode always holds every request to its budget from the start."
        )
    if grown := _tables(plan):
        lines.append(grown)
    if any(load.limited for load in loads):
        lines.append("+ more would fit; bounded by the slots.")
    if any(load.compacted_while_read for load in loads):
        lines.append("* the prompt is longer than the pool: parts of it are evicted before its end has been seen.")
    tight = [row for row in plan.rows if row.scratch > row.scratch_room]
    if tight:
        names = ", ".join(f"{row.form.name} {row.treatment.name}" for row in tight)
        worst = max(tight, key=lambda row: row.scratch - row.scratch_room)
        lines.append(
            f"Compacting the longest prompt may run out of memory ({names}): it takes about "
            f"{in_gib(worst.scratch)} GiB for a moment, and about {in_gib(worst.scratch_room)} are free. "
            "Lower --gpu-memory-utilization."
        )
    if plan.offloads:
        lines.append(
            "Offload needs as much pinned host memory for each card. It is not planned for fp8 made while loading: "
            "vLLM has no tensors yet when it offloads. Offload was not run here."
        )
    if question.geometry.quantized:
        lines.append(
            f"This checkpoint is already quantised ({question.geometry.quantized}): read the row with its bits, and "
            "give vLLM no --quantization."
        )
    if uneven := [form.name for form in question.formats if _uneven_groups(plan, form)]:
        lines.append(
            f"{', '.join(uneven)}: rows of some matrices are no multiple of the group, and vLLM refuses such a "
            "checkpoint: it would need smaller groups, which take a little more."
        )
    shown = {offload.form.name for offload in plan.offloads}
    noted = [form for form in question.formats if form.note and (form.name in shown or plan.fits(form))]
    for note in dict.fromkeys(form.note for form in noted):
        lines.append(f"{', '.join(form.name for form in noted if form.note == note)}: {note}.")
    return lines


def _tables(plan: Plan) -> str:
    """What page tables take at either end of the contexts, for the row where they take most; "" without any."""
    row = max((row for row in plan.rows if row.treatment.dealt), key=lambda row: row.memory.tables, default=None)
    if row is None or not row.memory.tables:
        return ""
    question = plan.question
    short, long = question.contexts[0], question.contexts[-1]
    at_long = table_bytes(question.geometry, question.device, row.serving, long)
    lines = (
        f'"deltamem" is its observation window and page tables, both exact; of them, tables up to '
        f"{in_gib(row.memory.tables)} GiB for --max-model-len {short:,} with --max-num-seqs {row.serving.max_num_seqs}"
    )
    if long == short:
        return f"{lines}."
    return (
        f"{lines}, {in_gib(at_long)} for {long:,}. The columns left of the contexts are for the shortest; longer ones "
        "are counted with their own tables. Fewer slots make them smaller."
    )


def _uneven_groups(plan: Plan, form: WeightFormat) -> bool:
    geometry, ranks = plan.question.geometry, plan.question.serving.ranks
    matrices = [p for p in geometry.parameters if p.kind == "matrix"]
    return form.group is not None and any(p.rank_shape(geometry, ranks)[-1] % form.group for p in matrices)


def commands(plan: Plan) -> list[str]:
    """Commands of the widest format that serves the shortest context, each at its longest asked context."""
    form = next((form for form in plan.question.formats if plan.fits(form)), None)
    lines = [""]
    if form is not None:
        lines.append(f"{form.name} weights, each KV cache at the longest of the contexts that it serves:")
        for row in plan.rows_of(form):
            if (load := row.best) is not None:
                command = serve_command(plan.question.geometry, form, row.treatment, row.serving, load.context)
                lines.append(f"  {command}")
        lines += _checkpoint_line(form)
    elif possible := [o for o in plan.offloads if math.isfinite(o.gib)]:
        # A format with a warning is nobody's first choice.
        offload = max(possible, key=lambda o: (not o.form.note, o.tokens_per_second))
        lines.append(f"The fastest offload above with {offload.form.name} weights:")
        lines.append(f"  {offload_command(plan, offload)}")
        lines += _checkpoint_line(offload.form)
    else:
        return []
    lines.append("Other rows: --weights, --context, or --json for all of them.")
    return lines


def _checkpoint_line(form: WeightFormat) -> list[str]:
    return [f"{CHECKPOINT} stands for a checkpoint of the model in this format: {form.checkpoint}."] * bool(
        form.checkpoint
    )


def offload_command(plan: Plan, offload: Offload) -> str:
    """The command of an offload that is possible."""
    return serve_command(
        plan.question.geometry, offload.form, offload.treatment, offload.serving, offload.context, offload.gib
    )


def short_context(context: int) -> str:
    """A context for tables: 8k for 8192."""
    return f"{context // 1024}k" if context % 1024 == 0 else f"{context:,}"


def in_gib(count: int) -> str:
    """Bytes in GiB, without the unit."""
    return f"{count / GIB:.2f}"
