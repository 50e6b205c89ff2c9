# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Known mistakes, put into deltamem on purpose: a check that lets one pass checks nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor


def _fresh_seq_lens() -> None:
    """Resident lengths in a new tensor each step: a captured graph never sees them."""
    from deltamem_vllm.integration.resident import ResidentRows

    def seq_lens(self: ResidentRows, logical: Tensor) -> Tensor:
        return logical - self._rows[: logical.shape[0]]

    ResidentRows.seq_lens = seq_lens  # type: ignore[method-assign]


def _fresh_pair_lengths() -> None:
    """Tokens of each (layer, kv head) in a new tensor each step."""
    from deltamem_vllm.dealing.tables import PageTables

    seq_lens = PageTables.seq_lens
    PageTables.seq_lens = lambda self, nominal: seq_lens(self, nominal).clone()  # type: ignore[method-assign]


def _fresh_page_tables() -> None:
    """Page tables in a new tensor each step."""
    from deltamem_vllm.dealing.tables import PageTables

    tables = PageTables.tables
    PageTables.tables = lambda self, rows: tables(self, rows).clone()  # type: ignore[method-assign]


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


def _stock_tables() -> None:
    """Compacted requests are read through vLLM's own block tables, as if every pair had the same pages."""
    from deltamem_vllm.integration.dealt_batch import DealtBatch

    DealtBatch.attach = lambda self, metadata: None  # type: ignore[method-assign]


def _wrong_page() -> None:
    """After each compaction one page of one (layer, kv head) is that of another pair."""
    from deltamem_vllm.dealing.tables import PageTables

    put = PageTables.put

    def put_and_spoil(self: PageTables, request_id: str, *args: Any, **kwargs: Any) -> None:
        put(self, request_id, *args, **kwargs)
        dealt = self.requests[request_id]
        last = int(dealt.counts[-1, -1]) - 1
        dealt.pages[-1, -1, last] = dealt.pages[0, 0, 0]

    PageTables.put = put_and_spoil  # type: ignore[method-assign]


def _wrong_cold_page() -> None:
    """In the last pair's row of the batch, one cold page is that of another pair."""
    from deltamem_vllm.dealing.cold_pages import ColdTables

    put = ColdTables.put

    def put_and_spoil(self: ColdTables, row: int, cold: Any) -> None:
        put(self, row, cold)
        if cold is None:
            return
        having = cold.counts.nonzero().tolist()
        if len(having) > 1:
            (layer, head), (other_layer, other_head) = having[-1], having[0]
            self._pages[layer, row, head, 0] = cold.pages[other_layer, other_head, 0]

    ColdTables.put = put_and_spoil  # type: ignore[method-assign]


def _stale_cold_tables() -> None:
    """A request's cold tables stay what its first compaction made them."""
    from deltamem_vllm.dealing.tables import PageTables

    put = PageTables.put
    first: dict[str, Any] = {}

    def put_stale(self: PageTables, request_id: str, *args: Any, **kwargs: Any) -> None:
        put(self, request_id, *args, **kwargs)
        first.setdefault(request_id, self.requests[request_id].cold)

    fill = PageTables.fill

    def fill_stale(self: PageTables, batch: Any) -> None:
        fill(self, batch)
        for row, (request_id, _) in enumerate(batch):
            if first.get(request_id) is not None and self._cold is not None:
                self._cold.put(row, first[request_id])

    PageTables.put = put_stale  # type: ignore[method-assign]
    PageTables.fill = fill_stale  # type: ignore[method-assign]


def _stale_serial() -> None:
    """The scheduler names another compaction than the worker's last one, in a step without compactions."""
    from deltamem_vllm.integration.worker import DeltaMemCPUWorker

    execute_model = DeltaMemCPUWorker.execute_model

    def execute_stale(self: DeltaMemCPUWorker, output: Any) -> Any:
        plan = getattr(output, "deltamem", None)
        if plan is not None and not plan.compactions:
            dealt = {request_id: serial + 1 for request_id, serial in plan.dealt.items()}
            output.deltamem = replace(plan, dealt=dealt)
        return execute_model(self, output)

    DeltaMemCPUWorker.execute_model = execute_stale  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "fresh-page-tables": _fresh_page_tables,
    "fresh-pair-lengths": _fresh_pair_lengths,
    "fresh-seq-lens": _fresh_seq_lens,
    "fresh-window-target": _fresh_window_target,
    "stale-serial": _stale_serial,
    "stale-cold-tables": _stale_cold_tables,
    "stock-append": _stock_append,
    "stock-tables": _stock_tables,
    "wrong-cold-page": _wrong_cold_page,
    "wrong-page": _wrong_page,
}


def inject(fault: str) -> None:
    """Make the mistake of that name in this process, for good; before the engine is built."""
    if fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}; available: {', '.join(FAULTS)}")
    FAULTS[fault]()
