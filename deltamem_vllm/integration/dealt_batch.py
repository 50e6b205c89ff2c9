# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How a batch reads dealt pages: what the attention backends need, worked out once a step.

To a kernel every (request, kv head) is a sequence of its own with one kv head; its page table and length differ from
layer to layer. Requests that were never compacted keep vLLM's own path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput

from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.integration.block_lists import BlockLists


@dataclass
class StockRows:
    """The rows of a mixed batch that vLLM's own path serves.

    Attributes
    ----------
    rows: ``[u]`` int64 batch rows.
    tokens: ``[t]`` int64 tokens of the batch, row after row; a slice if they stand together.
    query_start_loc: ``[u + 1]`` int32 first of them of each row.
    max_query_len: most tokens of one row.
    metadata: the backend's metadata of these rows, made by the first layer that asks.
    """

    rows: Tensor
    tokens: Tensor | slice
    query_start_loc: Tensor
    max_query_len: int
    metadata: Any = None


@dataclass
class DealtRead:
    """One step's reading of dealt pages.

    Attributes
    ----------
    pages: ``[num_pages, 1, block_size, 2 * D]``, the pool.
    tables: ``[L, R, H, W]`` int32 page numbers.
    seq_lens: ``[L, R, H]`` int32 tokens that each pair reads there.
    cold: ``[L, R, H, E]`` int32 cold pages that it reads besides, and ``[L, R, H]`` how many; None if no row has any.
    query_start_loc: ``[R * H + 1]`` int32, sequence (r, h) reads queries from its entry up to the next one's.
    order: ``[tokens * H]`` int64: the queries of the sequences, as rows of the batch's queries read as
        ``[T * H, G, D]``. None if the batch's own order is that of the sequences.
    max_query_len, max_seq_len: most queries and most tokens read of any sequence.
    stock: the rest of the batch; None if every row is read here.
    """

    pages: Tensor
    tables: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    order: Tensor | None
    max_query_len: int
    max_seq_len: int
    stock: StockRows | None = None
    cold: tuple[Tensor, Tensor] | None = None
    _layers: Sequence[tuple[Tensor, ...]] | None = None

    def set_lengths(self, seq_lens: Tensor) -> None:
        """The step's ``seq_lens`` are known, and ``tables`` are as wide as they."""
        self.seq_lens, self._layers = seq_lens, None

    def layer(self, index: int) -> tuple[Tensor, ...]:
        """One layer's tables ``[R * H, W]`` and lengths ``[R * H]``; where there are cold pages, their tables
        ``[R * H, E]`` and counts ``[R * H]``, too. Views, made once a step for all layers."""
        if self._layers is None:
            parts = (self.tables, self.seq_lens, *(self.cold or ()))
            self._layers = tuple(zip(*(part.flatten(1, 2).unbind() for part in parts), strict=True))
        return self._layers[index]


class DealtBatch:
    """Keeps the page tables in step with the runner's batch.

    Parameters
    ----------
    tables: persistent page tables.
    graphs: steps may be replayed from captured graphs. Those read all rows through the page tables, always, and from
        the addresses they were captured with.
    max_seq_len: longest sequence that a captured graph must be able to read.
    """

    def __init__(self, tables: PageTables, graphs: bool, max_seq_len: int) -> None:
        self.tables = tables
        self._graphs = graphs
        # GPU backends keep scratch memory and schedules for the whole batch in their metadata: it is read as one.
        self._can_split = not graphs and tables.pool.device.type == "cpu"
        self._max_seq_len = max_seq_len
        self._blocks = BlockLists()
        heads = tables.pool.heads
        self._one_query_each = torch.arange(tables.max_rows * heads + 1, dtype=torch.int32, device=tables.pool.device)
        self._read: DealtRead | None = None
        self._rows: Tensor | None = None

    @property
    def blocks(self) -> Mapping[str, Sequence[int]]:
        """Block table of every request."""
        return self._blocks.of

    def begin(self, output: SchedulerOutput) -> None:
        """Follow the scheduler; before the step's compactions and before the runner sees it."""
        self.tables.forget(self._blocks.update(output))

    def take_batch(self, output: SchedulerOutput, request_ids: Sequence[str]) -> None:
        """The batch's row order is final; the runner's tokens lie row after row."""
        dealt = output.deltamem.dealt  # type: ignore[attr-defined]
        rows = [i for i, r in enumerate(request_ids) if r in dealt]
        self._read = self._rows = None
        if not rows and not self._graphs:
            return
        counts = np.fromiter((output.num_scheduled_tokens[r] for r in request_ids), np.int64, len(request_ids))
        one_each = bool((counts == 1).all())
        if not rows and not one_each:
            return  # such a step is never a replay, and vLLM's own path serves it
        if not self._can_split:
            rows = list(range(len(request_ids)))
        self.tables.fill([(request_ids[i], self._blocks.of[request_ids[i]]) for i in rows])
        self.tables.clear_rows(len(rows))
        starts = np.cumsum(counts) - counts
        chosen = np.asarray(rows, dtype=np.int64)
        everything = len(rows) == len(request_ids)
        self._rows = None if everything else self._upload(chosen)
        longest = self._max_seq_len
        if not self._graphs:
            size = self.tables.pool.block_size  # what the blocks hold bounds what is in them
            longest = self.tables.longest((request_ids[i], len(self._blocks.of[request_ids[i]]) * size) for i in rows)
        self._read = DealtRead(
            pages=self.tables.pool.pages,
            tables=self.tables.tables(len(rows)),
            seq_lens=torch.empty(0),
            query_start_loc=self._query_start_loc(counts[chosen]),
            order=None if everything and one_each else self._order(starts[chosen], counts[chosen]),
            max_query_len=int(counts[chosen].max()),
            max_seq_len=longest,
            stock=None if everything else self._stock(chosen, starts, counts),
            cold=self._cold(len(rows), [request_ids[i] for i in rows]),
        )

    def take_dummy(self, rows: int, tokens: int) -> None:
        """A batch without requests; captured graphs learn their addresses here."""
        self._read = self._rows = None
        if self._graphs and rows == tokens:
            self.tables.clear_rows(0)
            self._read = DealtRead(
                pages=self.tables.pool.pages,
                tables=self.tables.tables(rows),
                seq_lens=torch.empty(0),
                query_start_loc=self._query_start_loc(np.ones(rows, dtype=np.int64)),
                order=None,
                max_query_len=1,
                max_seq_len=self._max_seq_len,
                cold=self.tables.cold(rows),
            )

    def attach(self, metadata: Any) -> None:
        """Let the attention seam find the step's reading on a backend's metadata object.

        Parameters
        ----------
        metadata: with nominal resident lengths ``seq_lens`` of all rows, padding included.
        """
        read = self._read
        if read is None or getattr(metadata, "deltamem_dealt", None) is read:
            return
        lengths = metadata.seq_lens
        if self._rows is not None:
            lengths = lengths.index_select(0, self._rows)
        elif lengths.shape[0] > read.tables.shape[1]:  # padded for a graph
            read.tables = self.tables.tables(lengths.shape[0])
            read.cold = self.tables.cold(lengths.shape[0])
            if read.order is None:
                read.query_start_loc = self._query_start_loc(np.ones(lengths.shape[0], dtype=np.int64))
        read.set_lengths(self.tables.seq_lens(lengths[: read.tables.shape[1]]))
        metadata.deltamem_dealt = read

    def _cold(self, rows: int, request_ids: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """The cold pages of a batch. Without any, the backend's own kernel reads it; a graph reads what may come."""
        dealt = (self.tables.requests.get(request_id) for request_id in request_ids)
        if self._graphs or any(one is not None and one.cold is not None for one in dealt):
            return self.tables.cold(rows)
        return None

    def _query_start_loc(self, counts: np.ndarray) -> Tensor:
        heads = self.tables.pool.heads
        if (counts == 1).all():
            return self._one_query_each[: len(counts) * heads + 1]
        ends = np.repeat(counts, heads).cumsum()
        return self._upload(np.concatenate([[0], ends]).astype(np.int32))

    def _order(self, starts: np.ndarray, counts: np.ndarray) -> Tensor:
        heads = self.tables.pool.heads
        lengths = np.repeat(counts, heads)  # sequence (row, head)
        first = np.repeat(starts, heads)
        head = np.tile(np.arange(heads), len(counts))
        within = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return self._upload((np.repeat(first, lengths) + within) * heads + np.repeat(head, lengths))

    def _stock(self, dealt_rows: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> StockRows:
        rows = np.setdiff1d(np.arange(len(counts)), dealt_rows)
        ends = counts[rows].cumsum()
        tokens = np.repeat(starts[rows] - (ends - counts[rows]), counts[rows]) + np.arange(ends[-1])
        together = tokens[-1] - tokens[0] + 1 == len(tokens)
        return StockRows(
            rows=self._upload(rows),
            tokens=slice(int(tokens[0]), int(tokens[-1]) + 1) if together else self._upload(tokens),
            query_start_loc=self._upload(np.concatenate([[0], ends]).astype(np.int32)),
            max_query_len=int(counts[rows].max()),
        )

    def _upload(self, values: np.ndarray) -> Tensor:
        host = torch.from_numpy(np.ascontiguousarray(values))
        device = self.tables.pool.device
        return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
