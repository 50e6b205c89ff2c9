# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The observation window: the last W post-RoPE queries of every request, per layer.

The attention seam writes it with one ``index_copy_`` per layer, from index buffers whose addresses never change, so
the write can be captured in a CUDA graph. Which token goes where is computed once a step, on the host, from numbers
the host already has: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowWrite:
    """One step's part of the window, attached to the step's attention metadata.

    Attributes
    ----------
    target: [k] int64, ring row of each recorded query; the last row is a bin for queries nobody needs.
    source: [k] int64, token of the batch each query comes from; None: token i for row i.
    """

    target: Tensor
    source: Tensor | None


@dataclass
class _Slot:
    index: int
    next_position: int = 0
    recorded: int = 0


class ObservationWindow:
    """Ring buffers of queries, one per layer, indexed by (request slot, position mod W).

    Parameters
    ----------
    window: W, queries per request.
    max_requests: requests that can be running at once.
    max_tokens: tokens of the largest batch, padding included.
    heads: (H_q, D) of each layer on this rank, in model order.
    dtype, device: of the queries.
    """

    def __init__(
        self,
        window: int,
        max_requests: int,
        max_tokens: int,
        heads: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.window = window
        self._bin = max_requests * window
        self.rings = [torch.zeros(self._bin + 1, h, d, dtype=dtype, device=device) for h, d in heads]
        self._device = device
        self._target = torch.full((max_tokens,), self._bin, dtype=torch.int64, device=device)
        self._slots: dict[str, _Slot] = {}
        self._free = list(range(max_requests - 1, -1, -1))

    @property
    def size_bytes(self) -> int:
        """Bytes of all rings."""
        return sum(r.nbytes for r in self.rings)

    def release(self, request_ids: Sequence[str] | set[str]) -> None:
        """Forget requests that finished or were preempted; unknown ids are ignored."""
        for request_id in request_ids:
            slot = self._slots.pop(request_id, None)
            if slot is not None:
                self._free.append(slot.index)

    def begin_step(
        self, request_ids: Sequence[str], first_positions: Sequence[int], counts: Sequence[int], padded: int
    ) -> WindowWrite:
        """Say where the queries of a real batch go.

        Parameters
        ----------
        request_ids, first_positions, counts: per batch row, the request, the logical position of its first token and
            its number of tokens; rows lie one after the other in the batch.
        padded: tokens of the batch with padding; the padding goes to the bin.

        Returns
        -------
        On a GPU always a write that covers every token of the batch: that is the form a graph was captured with, and
        the graph replays it. On a CPU, where nothing is captured, only the recorded tokens are listed.
        """
        w = self.window
        slots = np.empty(len(request_ids), dtype=np.int64)
        for row, (request_id, first, count) in enumerate(zip(request_ids, first_positions, counts, strict=True)):
            slot = self._slots.get(request_id)
            if slot is None:
                slot = self._slots[request_id] = _Slot(self._free.pop())
            if slot.next_position != first:
                slot.recorded = 0  # started after a prefix hit, or started over after a preemption
            slot.next_position = first + count
            slot.recorded = min(slot.recorded + count, w)
            slots[row] = slot.index
        count_array = np.asarray(counts, dtype=np.int64)
        ends = np.asarray(first_positions, dtype=np.int64) + count_array
        starts = np.cumsum(count_array) - count_array
        # The last min(W, count) tokens of each row.
        kept = np.minimum(count_array, w)
        offset = np.arange(kept.sum()) - np.repeat(np.cumsum(kept) - kept, kept)
        back = np.repeat(kept, kept) - offset
        token = np.repeat(starts + count_array, kept) - back
        target = np.repeat(slots, kept) * w + (np.repeat(ends, kept) - back) % w
        total = int(count_array.sum())
        if len(token) == total and padded == total:
            return WindowWrite(self._upload(target), None)
        if padded > total or self._device.type != "cpu":
            full = np.full(padded, self._bin, dtype=np.int64)
            full[token] = target
            return WindowWrite(self._upload(full), None)
        return WindowWrite(self._upload(target), self._to_device(token))

    def idle(self, padded: int) -> WindowWrite:
        """The write of a dummy batch of ``padded`` tokens: everything goes to the bin."""
        self._target[:padded].fill_(self._bin)
        return WindowWrite(self._target[:padded], None)

    def rows(self, request_id: str) -> Tensor:
        """Ring rows of a request's recorded queries, oldest first: [w] int64, 1 <= w <= W; the same in every layer.

        Raises
        ------
        RuntimeError: no query was recorded, which means the attention seam is not in place.
        """
        slot = self._slots.get(request_id)
        if slot is None or slot.recorded == 0:
            raise RuntimeError(
                f"no query of request {request_id} was recorded: the attention backend in use is not observed"
            )
        positions = np.arange(slot.next_position - slot.recorded, slot.next_position)
        return self._to_device(slot.index * self.window + positions % self.window)

    def _upload(self, target: np.ndarray) -> Tensor:
        buffer = self._target[: len(target)]
        buffer.copy_(self._to_device(target), non_blocking=True)
        return buffer

    def _to_device(self, values: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
        if self._device.type == "cpu":
            return host
        # The caching host allocator keeps the pinned copy alive until the transfer is done.
        return host.pin_memory().to(self._device, non_blocking=True)


def record(ring: Tensor, write: WindowWrite, query: Tensor) -> None:
    """Store a batch's queries.

    Parameters
    ----------
    ring: [rows, H_q, D], one layer's ring.
    write: where they go.
    query: [T, H_q, D], T >= the tokens the write names.
    """
    if write.source is None:
        count = write.target.shape[0]
        # Slicing costs as much as copying a decode step's few rows does.
        ring.index_copy_(0, write.target, query if query.shape[0] == count else query[:count])
    else:
        ring.index_copy_(0, write.target, query.index_select(0, write.source))
