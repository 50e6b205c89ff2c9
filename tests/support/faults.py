# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Known mistakes, put into deltamem on purpose: a check that lets one pass checks nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def _fresh_seq_lens() -> None:
    """Resident lengths in a new tensor each step: a captured graph never sees them."""
    from deltamem_vllm.integration.resident import ResidentRows

    def seq_lens(self: ResidentRows, logical: Tensor) -> Tensor:
        return logical - self._rows[: logical.shape[0]]

    ResidentRows.seq_lens = seq_lens  # type: ignore[method-assign]


def _fresh_window_target() -> None:
    """The window's target rows in a new tensor each step: a captured write goes on filling the bin."""
    from deltamem_vllm.scoring.window import ObservationWindow

    ObservationWindow._upload = ObservationWindow._to_device  # type: ignore[method-assign]


def _stock_append() -> None:
    """vLLM's own append to the row of a request that is compacted in the same step is not dropped."""
    from deltamem_vllm.integration.runner_v2 import RunnerV2Hooks

    begin_step = RunnerV2Hooks.begin_step

    def with_append(self: RunnerV2Hooks, output: Any) -> None:
        appends = list(output.scheduled_cached_reqs.new_block_ids)
        begin_step(self, output)
        output.scheduled_cached_reqs.new_block_ids[:] = appends

    RunnerV2Hooks.begin_step = with_append  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "fresh-seq-lens": _fresh_seq_lens,
    "fresh-window-target": _fresh_window_target,
    "stock-append": _stock_append,
}


def inject(fault: str) -> None:
    """Make the mistake of that name in this process, for good; before the engine is built."""
    if fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}; available: {', '.join(FAULTS)}")
    FAULTS[fault]()
