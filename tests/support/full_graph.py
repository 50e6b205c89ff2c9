# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""FULL CUDA graphs of model runner V2, acted out on a CPU.

A replayed graph does not see the metadata of its step: it reads the addresses that it was captured with. Here the
metadata objects of the capture take the graph's place. Every decode step runs the model with those, so anything that a
step put into a new tensor instead of a persistent one has no effect, as on a GPU.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, prepare_inputs_to_capture


def expect_graphs() -> None:
    """Let workers of this process prepare for FULL graphs, which vLLM has on GPUs only; before the engine is built."""
    from deltamem_vllm.integration import worker

    worker.has_graphs = lambda vllm_config: True


class FullGraph:
    """The one decode graph of a runner, installed on construction.

    Parameters
    ----------
    runner: vLLM's V2 runner, KV cache initialised and deltamem's hooks in place.
    rows: requests of the graph; decode batches of fewer are padded, larger ones run eagerly.
    events: "replays", "padded_replays" and "eager_steps" (of real batches) are counted here.
    """

    def __init__(self, runner: Any, rows: int, events: Counter[str]) -> None:
        self._runner = runner
        self._rows = rows
        self._events = events
        with torch.inference_mode():
            self._captured = prepare_inputs_to_capture(
                rows,
                rows,
                runner.model_state,
                runner.input_buffers,
                runner.block_tables,
                runner.attn_groups,
                runner.kv_cache_config,
                full_cudagraph=True,
                max_query_len=1,
            )
        self._step_metadata: dict[str, Any] = {}
        manager, model_state = runner.cudagraph_manager, runner.model_state
        self._stock_dispatch = manager.dispatch
        self._stock_prepare_attn = model_state.prepare_attn
        manager.dispatch = self._dispatch
        manager.run_fullgraph = self._replay
        model_state.prepare_attn = self._prepare_attn

    def _dispatch(self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, **kwargs: Any) -> Any:
        if uniform_token_count != 1 or num_reqs > self._rows:
            self._events["eager_steps"] += 1
            return self._stock_dispatch(num_reqs, num_tokens, uniform_token_count, **kwargs)
        self._events["replays"] += 1
        self._events["padded_replays"] += num_reqs < self._rows
        return BatchExecutionDescriptor(
            cg_mode=CUDAGraphMode.FULL, num_tokens=self._rows, num_reqs=self._rows, uniform_token_count=1
        )

    def _prepare_attn(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._step_metadata = self._stock_prepare_attn(*args, **kwargs)
        return self._step_metadata

    def _replay(self, descriptor: BatchExecutionDescriptor) -> torch.Tensor:
        captured = self._captured.attn_metadata
        assert captured is not None, "captured with attention"
        for layer, metadata in captured.items():
            # The CPU backend's work split, made in build(). GPU backends keep theirs in a persistent buffer, too.
            metadata.scheduler_metadata = self._step_metadata[layer].scheduler_metadata
        buffers, rows = self._runner.input_buffers, descriptor.num_tokens
        with set_forward_context(
            captured,
            self._runner.vllm_config,
            num_tokens=rows,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=self._captured.slot_mappings,
        ):
            hidden: torch.Tensor = self._runner.model(
                input_ids=buffers.input_ids[:rows], positions=buffers.positions[:rows]
            )
        return hidden
