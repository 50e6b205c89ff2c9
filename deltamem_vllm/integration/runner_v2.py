# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Hooks of Model Runner V2 (vLLM's GPU default): a ModelState with two overrides, and no wrap at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput

from deltamem_vllm.integration.resident import StepState


class RunnerV2Hooks:
    """Makes a V2 runner read and write resident tokens.

    Parameters
    ----------
    runner: vLLM's ``GPUModelRunner`` (V2) or a subclass, KV cache initialised.
    state: of the step.
    """

    def __init__(self, runner: Any, state: StepState) -> None:
        self._runner = runner
        self._state = state
        self._output: SchedulerOutput | None = None
        model_state = runner.model_state
        # Others hold references to the object (speculator, ubatch runner): its class changes, not its identity.
        model_state.__class__ = _resident_model_state(type(model_state))
        model_state.deltamem_hooks = self

    def begin_step(self, output: SchedulerOutput) -> None:
        """Called after the step's compactions, before the runner executes it.

        A compacted request's whole row is staged here. vLLM's own append for it is dropped: staged writes have no
        order among themselves, and the append would land behind our row.
        """
        self._state.begin(output)
        self._output = output
        plans = {plan.request_id: plan for plan in output.deltamem.compactions}  # type: ignore[attr-defined]
        if not plans:
            return
        cached = output.scheduled_cached_reqs
        for i, request_id in enumerate(cached.req_ids):
            if request_id in plans:
                cached.new_block_ids[i] = None
        slots = self._runner.req_states.req_id_to_index
        for request_id, plan in plans.items():
            if request_id in slots:
                blocks = (list(plan.blocks_after),)
                self._runner.block_tables.append_block_ids(slots[request_id], blocks, overwrite=True)

    def end_step(self) -> None:
        """Called when the forward pass was issued."""
        self._output = None

    def take_batch(self, input_batch: Any) -> None:
        """A real batch: its rows are final and its block tables gathered, slot mappings still logical."""
        assert self._output is not None, "vLLM ran a real batch outside DeltaMem's execute_model"
        rows = self._state.rows
        self._state.take_batch(self._output, input_batch.req_ids, input_batch.num_tokens_after_padding)
        self._real = input_batch
        if rows.any:
            # Same persistent output buffer; vLLM views it by layer only after this.
            self._runner.block_tables.compute_slot_mappings(
                input_batch.idx_mapping,
                input_batch.query_start_loc,
                rows.positions(input_batch.query_start_loc, input_batch.num_reqs, input_batch.positions),
                num_tokens_padded=input_batch.num_tokens_after_padding,
            )

    _real: Any = None

    def resident(self, input_batch: Any) -> Any:
        """A copy of the batch with resident lengths; the batch itself stays logical for the sampler."""
        real, self._real = self._real, None
        if input_batch is not real:
            self._state.take_dummy(input_batch.num_reqs, input_batch.num_tokens_after_padding)
        rows = self._state.rows
        changed: dict[str, Any] = {"seq_lens": rows.seq_lens(input_batch.seq_lens)}
        if rows.any:
            changed["seq_lens_cpu_upper_bound"] = rows.upper_bound(input_batch.seq_lens_cpu_upper_bound)
        return replace(input_batch, **changed)

    def attach(self, metadata: dict[str, Any]) -> None:
        """Give the window write to every layer's metadata (layers of a group share one object)."""
        for layer in metadata.values():
            self._state.attach(layer)


def _resident_model_state(base: type) -> type:
    class ResidentModelState(base):  # type: ignore[misc]
        deltamem_hooks: RunnerV2Hooks

        def preprocess_state(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
            self.deltamem_hooks.take_batch(input_batch)
            super().preprocess_state(input_batch, *args, **kwargs)

        def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            resident = self.deltamem_hooks.resident(input_batch)
            metadata: dict[str, Any] = super().prepare_attn(resident, *args, **kwargs)
            self.deltamem_hooks.attach(metadata)
            return metadata

    ResidentModelState.__name__ = ResidentModelState.__qualname__ = f"Resident{base.__name__}"
    return ResidentModelState
