# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Puts model, cards, weight formats and KV treatments together into rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.evaluation.plan.capacity import Load, Pool, Treatment, load_of, longest_context, needed_blocks
from deltamem_vllm.evaluation.plan.catalog import GIB, Device
from deltamem_vllm.evaluation.plan.errors import PlanError
from deltamem_vllm.evaluation.plan.formats import WeightFormat
from deltamem_vllm.evaluation.plan.geometry import Geometry
from deltamem_vllm.evaluation.plan.memory import Memory, Serving, default_batch, memory_of, scratch_bytes
from deltamem_vllm.memory.budgets import budget_for
from deltamem_vllm.request_options import KEEP_RATIO, RequestOptions

CARD_COUNTS = (1, 2, 4, 8)
"""Tried when the cards at hand are too few."""

OFFLOAD_STEP = GIB // 2
"""--cpu-offload-gb is rounded up to this: vLLM offloads whole parameters until the figure is reached."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes
    ----------
    contexts: tokens, ascending, none above the model's own limit.
    serving: `max_num_seqs` is the largest tried.
    fixed_seqs: whether only that one is tried.
    window: observed queries of the scorer, 0 if it needs none.
    """

    geometry: Geometry
    device: Device
    contexts: tuple[int, ...]
    formats: tuple[WeightFormat, ...]
    treatments: tuple[Treatment, ...]
    serving: Serving
    fixed_seqs: bool
    window: int


@dataclass(frozen=True)
class Row:
    """One weight format with one KV treatment."""

    form: WeightFormat
    treatment: Treatment
    serving: Serving
    memory: Memory
    """For the shortest asked context; page tables take more for longer ones."""
    pool: Pool
    """What that leaves."""
    longest: int
    """Tokens of the longest single request."""
    loads: tuple[Load, ...]
    scratch: int
    """Estimated bytes that compacting the longest asked prompt that fits takes beyond what vLLM counts."""
    scratch_room: int
    """Estimated bytes there are for it."""

    @property
    def best(self) -> Load | None:
        """The longest asked context that is served."""
        return next((load for load in reversed(self.loads) if load.requests), None)


@dataclass(frozen=True)
class Offload:
    """CPU offload that makes one request of a length fit."""

    form: WeightFormat
    treatment: Treatment
    context: int
    serving: Serving
    gib: float
    """For --cpu-offload-gb, of each card; inf if even all layers would not be enough."""
    tokens_per_second: float
    """Estimated upper bound for one request: the offloaded bytes cross PCIe for every token."""


@dataclass(frozen=True)
class Plan:
    """The answer."""

    question: Question
    rows: tuple[Row, ...]
    offloads: tuple[Offload, ...]
    cards_needed: dict[str, int | None] = field(default_factory=dict)
    """Weight formats that do not serve the shortest context here -> cards of this kind that would, None above 8."""

    def rows_of(self, form: WeightFormat) -> list[Row]:
        return [row for row in self.rows if row.form == form]

    def fits(self, form: WeightFormat) -> bool:
        """Whether the shortest context is served with some treatment."""
        return any(row.loads[0].requests for row in self.rows_of(form))


def make_treatments(config: DeltaMemConfig, keep_ratios: Sequence[float]) -> tuple[Treatment, ...]:
    """Stock vLLM with a 16-bit and an fp8 KV cache, and deltamem at each ratio."""
    stock = (Treatment("stock bf16", 2), Treatment("stock fp8", 1, ("--kv-cache-dtype", "fp8")))
    return stock + tuple(_deltamem(config, ratio) for ratio in keep_ratios)


def choose_contexts(given: Sequence[int] | None, max_positions: int) -> tuple[int, ...]:
    """The contexts asked for, or 4k, 8k, 32k and 128k, up to the model's own limit."""
    if given:
        if (longest := max(given)) > max_positions:
            raise PlanError(f"--context: got {longest}, allowed: up to the model's own {max_positions} positions")
        return tuple(sorted(set(given)))
    usual = [c for c in (4096, 8192, 32768, 131072) if c <= max_positions]
    return tuple(usual or [max_positions])


def make_question(
    geometry: Geometry,
    device: Device,
    contexts: tuple[int, ...],
    formats: Sequence[WeightFormat],
    treatments: Sequence[Treatment],
    window: int,
    serving: Serving,
    max_num_seqs: int | None,
    batch_tokens: int | None,
) -> Question:
    """Fill what was left open with vLLM's defaults for the card, and check that the ranks divide the model."""
    default_tokens, default_seqs = default_batch(device)
    tokens = batch_tokens or default_tokens
    if max_num_seqs is not None and max_num_seqs > tokens:
        raise PlanError(f"--max-num-seqs: got {max_num_seqs}, allowed: up to --max-num-batched-tokens ({tokens})")
    geometry.rank_query_heads(serving.ranks)
    geometry.rank_kv_heads(serving.ranks)
    serving = replace(serving, batch_tokens=tokens, max_num_seqs=max_num_seqs or min(default_seqs, tokens))
    fixed = max_num_seqs is not None
    return Question(geometry, device, contexts, tuple(formats), tuple(treatments), serving, fixed, window)


def make_plan(question: Question) -> Plan:
    """Answer a question."""
    rows = tuple(make_row(question, form, t) for form in question.formats for t in question.treatments)
    plan = Plan(question, rows, ())
    short = [form for form in question.formats if not plan.fits(form)]
    offloads = [
        make_offload(question, form, treatment, context)
        for form in short
        if not form.online  # vLLM has no tensors yet to offload when it makes the format itself
        for context in question.contexts
        for treatment in question.treatments
    ]
    return Plan(question, rows, tuple(offloads), {form.name: _cards_needed(question, form) for form in short})


def make_row(question: Question, form: WeightFormat, treatment: Treatment) -> Row:
    """The row with the --max-num-seqs that serves most requests of the shortest context; the smaller one if equal."""
    largest = question.serving.max_num_seqs
    tried = [largest] if question.fixed_seqs else [2**n for n in range(largest.bit_length()) if 2**n <= largest]
    weights = question.geometry.weight_bytes(form, question.serving.ranks)
    rows = [_row(question, form, weights, treatment, question.serving.with_seqs(seqs)) for seqs in tried]
    return max(rows, key=lambda row: (row.loads[0].requests, -row.serving.max_num_seqs))


def make_offload(question: Question, form: WeightFormat, treatment: Treatment, context: int) -> Offload:
    """The least offload for one request of ``context`` tokens, with as few request slots as allowed."""
    geometry, device = question.geometry, question.device
    serving = question.serving if question.fixed_seqs else question.serving.with_seqs(1)
    weights = geometry.weight_bytes(form, serving.ranks)
    memory = _memory(question, weights, treatment, serving, context)
    block = geometry.token_bytes(treatment.element_bytes, serving.ranks) * serving.block_size
    blocks = needed_blocks(treatment.budget, context, serving.block_size, serving.chunk_tokens) + 1
    steps = max(0, math.ceil((blocks * block - memory.pool) / OFFLOAD_STEP))
    offloaded = steps * OFFLOAD_STEP
    if offloaded > geometry.layer_bytes(form, serving.ranks):
        return Offload(form, treatment, context, serving, math.inf, 0.0)
    rate = device.host_gb_per_s * 1e9 / offloaded if offloaded else math.inf
    return Offload(form, treatment, context, serving, offloaded / GIB, rate)


def _memory(question: Question, weights: int, treatment: Treatment, serving: Serving, context: int) -> Memory:
    """One card's memory of a server whose --max-model-len is ``context``."""
    window = question.window if treatment.budget else 0
    dealt = context if treatment.dealt else 0
    return memory_of(question.geometry, question.device, weights, serving, window, dealt)


def _row(question: Question, form: WeightFormat, weights: int, treatment: Treatment, serving: Serving) -> Row:
    geometry, device, chunk = question.geometry, question.device, serving.chunk_tokens
    token_bytes = geometry.token_bytes(treatment.element_bytes, serving.ranks)

    def pool_for(context: int) -> Pool:
        available = _memory(question, weights, treatment, serving, context).pool
        return Pool.of(available, token_bytes, serving.block_size)

    loads = tuple(load_of(pool_for(c), treatment, c, serving.max_num_seqs, chunk) for c in question.contexts)
    read = max((min(load.context, load.pool.tokens) for load in loads if load.requests), default=0)
    memory = _memory(question, weights, treatment, serving, question.contexts[0])
    return Row(
        form=form,
        treatment=treatment,
        serving=serving,
        memory=memory,
        pool=loads[0].pool,
        longest=longest_context(pool_for, treatment, geometry.max_positions, chunk),
        loads=loads,
        scratch=scratch_bytes(geometry, serving, read) if treatment.budget else 0,
        scratch_room=memory.activations + device.total_bytes - memory.budget,
    )


def _cards_needed(question: Question, form: WeightFormat) -> int | None:
    for count in CARD_COUNTS:
        if count <= question.serving.ranks:
            continue
        more = replace(question, serving=replace(question.serving, ranks=count))
        try:
            rows = [make_row(more, form, treatment) for treatment in question.treatments]
        except PlanError:  # this number of cards does not divide the model
            continue
        if any(row.loads[0].requests for row in rows):
            return count
    return None


def _deltamem(config: DeltaMemConfig, ratio: float) -> Treatment:
    budget = budget_for(RequestOptions.from_extra_args({KEEP_RATIO: ratio}, config), config)
    flags = ("--kv-cache-policy", "deltamem", "--deltamem-config.keep_ratio", f"{ratio:g}")
    return Treatment(f"deltamem {ratio:g}", 2, flags, budget)
