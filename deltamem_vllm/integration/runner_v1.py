# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Hooks of Model Runner V1 (vLLM's CPU runner): three wraps on instances, none on classes."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from typing import Any

from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput

from deltamem_vllm.integration.resident import StepState


class RunnerV1Hooks:
    """Makes a V1 runner read and write resident tokens.

    Parameters
    ----------
    runner: vLLM's ``GPUModelRunner`` (V1) or a subclass, KV cache initialised.
    state: of the step.
    """

    def __init__(self, runner: Any, state: StepState) -> None:
        self._runner = runner
        self._state = state
        self._in_batch = False
        self._wrap_state_update()
        self._wrap_slot_mapping()
        for groups in runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    self._wrap_builder(builder)

    def begin_step(self, output: SchedulerOutput) -> None:
        """Called after the step's compactions, before the runner executes it."""
        self._state.begin(output)

    def end_step(self) -> None:
        """Called when the forward pass was issued: batches from here on are dummies until the next step."""
        self._in_batch = False

    def _wrap_state_update(self) -> None:
        runner, state = self._runner, self._state
        update = runner._update_states

        @wraps(update)
        def update_states(output: SchedulerOutput) -> Any:
            result = update(output)
            batch = runner.input_batch
            for plan in output.deltamem.compactions:  # type: ignore[attr-defined]
                request = runner.requests.get(plan.request_id)
                if request is None:
                    continue
                request.block_ids = (list(plan.blocks_after),)
                row = batch.req_id_to_index.get(plan.request_id)
                if row is not None:
                    batch.block_table.add_row(request.block_ids, row)
            state.take_batch(output, batch.req_ids, padded=output.total_num_scheduled_tokens)
            self._in_batch = True
            return result

        runner._update_states = update_states

    def _wrap_slot_mapping(self) -> None:
        table, rows = self._runner.input_batch.block_table, self._state.rows
        compute = table.compute_slot_mapping

        @wraps(compute)
        def compute_slot_mapping(num_reqs: int, query_start_loc: Any, positions: Any) -> None:
            if self._in_batch and rows.any:
                positions = rows.positions(query_start_loc, num_reqs, positions)
            compute(num_reqs, query_start_loc, positions)

        table.compute_slot_mapping = compute_slot_mapping

    def _wrap_builder(self, builder: AttentionMetadataBuilder[Any]) -> None:
        build, state = builder.build, self._state

        @wraps(build)
        def build_resident(
            common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any
        ) -> Any:
            if not self._in_batch:
                state.take_dummy(common_attn_metadata.num_reqs, common_attn_metadata.num_actual_tokens)
            metadata = build(common_prefix_len, self._resident(common_attn_metadata), *args, **kwargs)
            state.attach(metadata)
            return metadata

        builder.build = build_resident  # type: ignore[method-assign]

    def _resident(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        rows = self._state.rows
        changed: dict[str, Any] = {
            "seq_lens": rows.seq_lens(common.seq_lens),
            "_num_computed_tokens_cache": None,  # derived lazily from seq_lens
        }
        if rows.any and common.seq_lens_cpu_upper_bound is not None:
            bound = rows.upper_bound(common.seq_lens_cpu_upper_bound)
            changed |= {"seq_lens_cpu_upper_bound": bound, "max_seq_len": int(bound.max())}
        return replace(common, **changed)
