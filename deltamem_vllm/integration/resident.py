# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""From logical to resident lengths inside one step: shared by the hooks of both model runners.

vLLM's runners go on in logical tokens. Two quantities are turned into resident ones on the way to the attention
kernels: sequence lengths and the positions from which slot mappings are computed. ``positions`` and ``seq_lens`` of
the runner itself stay logical: RoPE, samplers and logit processors read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput

from deltamem_vllm.integration.dealt_batch import DealtBatch
from deltamem_vllm.scoring.window import ObservationWindow, WindowWrite


class ResidentRows:
    """Evicted tokens by batch row, and the resident lengths derived from them.

    Parameters
    ----------
    max_requests, max_tokens: of one batch, padding included.
    device: of the runner.

    Attributes
    ----------
    host: [rows] int32 on the host, the last step's evicted tokens.
    any: whether any row of the current batch has evicted tokens; known on the host.
    """

    def __init__(self, max_requests: int, max_tokens: int, device: torch.device) -> None:
        # One row more than requests: padded tokens fall on it and must find 0.
        self._rows = torch.zeros(max_requests + 1, dtype=torch.int32, device=device)
        # Handed to every metadata builder, at graph capture as in every step: its address must never change.
        self._seq_lens = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._tokens = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self.host = np.zeros(0, dtype=np.int32)
        self.any = False

    def set(self, request_ids: Sequence[str], evicted: Mapping[str, int]) -> None:
        """Take over the evicted counts of a batch whose rows are ``request_ids``."""
        self.host = np.fromiter((evicted.get(r, 0) for r in request_ids), dtype=np.int32, count=len(request_ids))
        self.any = bool(self.host.any())
        self._rows.zero_()
        if self.any:
            host = torch.from_numpy(self.host)
            if self._rows.device.type != "cpu":
                host = host.pin_memory()
            self._rows[: len(host)].copy_(host, non_blocking=True)

    def clear(self) -> None:
        """No batch, or a dummy one: nothing is evicted."""
        self.host = np.zeros(0, dtype=np.int32)
        self.any = False
        self._rows.zero_()

    def seq_lens(self, logical: Tensor) -> Tensor:
        """Resident lengths ([n] int32, persistent buffer) of logical ones ([n])."""
        n = logical.shape[0]
        return torch.sub(logical, self._rows[:n], out=self._seq_lens[:n])

    def upper_bound(self, logical: Tensor) -> Tensor:
        """The same on the host, from vLLM's host-side bound ([n])."""
        resident = logical.clone()
        rows = min(len(self.host), resident.shape[0])
        resident[:rows] -= torch.from_numpy(self.host[:rows])
        return resident

    def positions(self, query_start_loc: Tensor, num_requests: int, logical: Tensor) -> Tensor:
        """Where each token's key and value go, counted in resident tokens.

        Parameters
        ----------
        query_start_loc: [>= num_requests + 1] first token of each row.
        logical: [T] logical positions, padding included.
        """
        ends = query_start_loc[1 : num_requests + 1]
        row = torch.searchsorted(ends, self._tokens[: logical.shape[0]].to(ends.dtype), right=True)
        return logical - self._rows.index_select(0, row)


class StepState:
    """What both hooks know of the step that is running.

    Parameters
    ----------
    rows: evicted tokens by batch row.
    window: the observation window; None if the scorer needs none.
    dealt: how the batch reads dealt pages; None if none are ever dealt.
    """

    def __init__(self, rows: ResidentRows, window: ObservationWindow | None, dealt: DealtBatch | None) -> None:
        self.rows = rows
        self.window = window
        self.dealt = dealt
        self.write: WindowWrite | None = None

    def begin(self, output: SchedulerOutput) -> None:
        """Forget the requests that left; called before the runner sees the step."""
        if self.window is not None:
            self.window.release(output.finished_req_ids)
            self.window.release(output.preempted_req_ids or ())

    def take_batch(self, output: SchedulerOutput, request_ids: Sequence[str], padded: int) -> None:
        """The batch's row order is final: work out its evicted rows and window write."""
        self.rows.set(request_ids, output.deltamem.evicted)  # type: ignore[attr-defined]
        if self.dealt is not None and request_ids:
            self.dealt.take_batch(output, request_ids)
        if self.window is not None and request_ids:
            first = first_positions(output)
            counts = [output.num_scheduled_tokens[r] for r in request_ids]
            self.write = self.window.begin_step(request_ids, [first[r] for r in request_ids], counts, padded)

    def take_dummy(self, requests: int, padded: int) -> None:
        """A batch without requests (warm-up, graph capture, data-parallel idling)."""
        self.rows.clear()
        if self.dealt is not None:
            self.dealt.take_dummy(requests, padded)
        self.write = self.window.idle(padded) if self.window is not None else None

    def attach(self, metadata: Any) -> None:
        """Let the attention seam find the window write and the dealt pages on a backend's metadata object."""
        if self.write is not None:
            metadata.deltamem_window = self.write
        if self.dealt is not None:
            self.dealt.attach(metadata)


def first_positions(output: SchedulerOutput) -> dict[str, int]:
    """Logical position of the first token each request computes in this step."""
    cached = output.scheduled_cached_reqs
    first = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    first.update((new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs)
    return first
