# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which pages each (layer, kv head) of a request reads: tables that live as long as the engine.

Building all tables anew in every step would cost milliseconds (layers x requests x heads x pages). Here a request's
rows are written once after a compaction; later steps only append the page of a new block, and move rows when the
batch changes.

A pair's hot pages are its dealt ones, full to the last slot, and then those of the tail: the blocks that vLLM gave to
the request after its last compaction, which every pair uses alike. Cold pages have tables of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_vllm.dealing.cold_pages import ColdPages, ColdTables
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.rated import Rated
from deltamem_vllm.memory.tiers import ColdHeld


@dataclass(frozen=True)
class DealtRequest:
    """What the last compaction dealt to one request.

    Attributes
    ----------
    serial: of that compaction.
    blocks: m, how many blocks of the request's block table were dealt; the rest are its tail.
    counts: ``[L, H]`` int64, hot pages of each pair.
    pages: ``[L, H, widest]`` int32 page numbers; entries past a pair's count are 0.
    rated: what the entries in them were rated; None by a scorer whose scores do not last.
    cold: the cold pages; None if there are none.
    """

    serial: int
    blocks: int
    counts: Tensor
    pages: Tensor
    rated: Rated | None = None
    cold: ColdPages | None = None

    @property
    def widest(self) -> int:
        """Most pages of any pair."""
        return self.pages.shape[2]


@dataclass
class _Row:
    """What one row of the batch tables holds."""

    request_id: str
    serial: int
    blocks: int


class PageTables:
    """Page tables of the dealt requests, and of the batch that is running.

    Parameters
    ----------
    pool: the pages.
    max_rows: most requests of a batch, padding included.
    max_width: most pages of one pair: ``ceil(max_model_len / block_size) + 1``.
    fixed: allocate for ``max_width`` at once, so that addresses never change (captured graphs). Otherwise tables grow
        as needed.
    cold: some pages may be cold.

    Attributes
    ----------
    requests: request id -> DealtRequest.
    max_rows: as given.
    """

    def __init__(self, pool: PagePool, max_rows: int, max_width: int, fixed: bool, cold: bool = False) -> None:
        self.pool = pool
        self.requests: dict[str, DealtRequest] = {}
        self.max_rows, self._max_width = max_rows, max_width
        shape = (pool.layers, max_rows, pool.heads)
        self._tables = torch.zeros(
            *shape, max_width if fixed else min(max_width, 16), dtype=torch.int32, device=pool.device
        )
        # Tokens a pair holds more than its request nominally does: (n - m) * block_size.
        self._surplus = torch.zeros(shape, dtype=torch.int32, device=pool.device)
        self._seq_lens = torch.zeros(shape, dtype=torch.int32, device=pool.device)
        self._rows: list[_Row | None] = [None] * max_rows
        self._used = 0  # rows from here on have no surplus
        self._cold = ColdTables(shape, max_width, fixed, pool.device) if cold else None

    # ---- requests ----------------------------------------------------------------------------------------------

    def put(
        self,
        request_id: str,
        serial: int,
        blocks: int,
        counts: Tensor,
        target: Tensor,
        rated: Rated | None = None,
        cold: ColdPages | None = None,
    ) -> None:
        """Take over what a compaction dealt.

        Parameters
        ----------
        request_id, serial, blocks, rated, cold: as in `DealtRequest`.
        counts: ``[L, H]`` int64 hot pages, summing up to ``len(target)``.
        target: ``[pages]`` page numbers, those of the first pair first, then the second's, layer by layer.
        """
        widest = int(counts.max())
        ends = counts.flatten().cumsum(0).view_as(counts)
        column = torch.arange(widest, device=target.device)
        index = ((ends - counts).unsqueeze(-1) + column).clamp_(max=len(target) - 1)
        pages = target.to(torch.int32)[index].masked_fill_(column >= counts.unsqueeze(-1), 0)
        self.requests[request_id] = DealtRequest(serial, blocks, counts, pages, rated, cold)

    def keep_only(self, dealt: Mapping[str, int]) -> None:
        """Check that these requests, and no others, are known under these serials; those that left are forgotten.

        Raises
        ------
        RuntimeError: scheduler and worker disagree about a request's last compaction.
        """
        for request_id in [known for known in self.requests if known not in dealt]:
            del self.requests[request_id]
        for request_id, serial in dealt.items():
            known = self.requests.get(request_id)
            if known is None or known.serial != serial:
                found = "none" if known is None else f"that of compaction {known.serial}"
                raise RuntimeError(
                    f"stale page table: request {request_id} was last dealt pages by compaction {serial}, but this "
                    f"worker has {found}; scheduler and worker are out of step"
                )

    def source(self, request_id: str, blocks: Sequence[int], resident_len: int) -> tuple[Tensor, Tensor]:
        """Every hot page a request can be read from.

        Parameters
        ----------
        request_id: dealt or not.
        blocks: its block table.
        resident_len: nominal tokens in those blocks.

        Returns
        -------
        Page numbers ``[L, H, W]`` int32 in token order and tokens of each pair ``[L, H]`` int64 on the host.
        """
        pool, dealt = self.pool, self.requests.get(request_id)
        if dealt is None:
            pages = pool.ids(torch.tensor(blocks, device=pool.device))
            return pages, torch.full((pool.layers, pool.heads), resident_len)
        tail = len(blocks) - dealt.blocks
        pages = torch.zeros(pool.layers, pool.heads, dealt.widest + tail, dtype=torch.int32, device=pool.device)
        pages[..., : dealt.widest] = dealt.pages
        if tail:
            self._append(pages, dealt, blocks, 0)
        lengths = dealt.counts.cpu() * pool.block_size + resident_len - dealt.blocks * pool.block_size
        return pages, lengths

    def _append(self, rows: Tensor, dealt: DealtRequest | None, blocks: Sequence[int], known: int) -> None:
        """Write the tail's pages from the ``known``-th tail block on into rows ``[L, H, W]``."""
        start = known + (dealt.blocks if dealt is not None else 0)
        pages = self.pool.ids(torch.tensor(blocks[start:], device=self.pool.device))
        if dealt is None:
            rows[..., start : len(blocks)] = pages
            return
        column = dealt.counts.unsqueeze(-1) + torch.arange(known, known + pages.shape[2], device=pages.device)
        rows.scatter_(2, column, pages)

    # ---- the batch ---------------------------------------------------------------------------------------------

    def fill(self, batch: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Make row i of the tables that of the i-th request (id and block table), touching only what changed."""
        width = max((self._width(request_id, blocks) for request_id, blocks in batch), default=0)
        if width > self._tables.shape[3]:
            self._grow(width)
        self._used = max(self._used, len(batch))
        for row, (request_id, blocks) in enumerate(batch):
            dealt = self.requests.get(request_id)
            serial, first = (dealt.serial, dealt.blocks) if dealt is not None else (0, 0)
            state, tables = self._rows[row], self._tables[:, row]
            if state is None or (state.request_id, state.serial) != (request_id, serial) or state.blocks > len(blocks):
                state = self._rows[row] = _Row(request_id, serial, first)
                if dealt is None:
                    self._surplus[:, row] = 0
                else:
                    tables[..., : dealt.widest] = dealt.pages
                    self._surplus[:, row] = (dealt.counts - first) * self.pool.block_size
                if self._cold is not None:
                    self._cold.put(row, None if dealt is None else dealt.cold)
            if state.blocks < len(blocks):
                self._append(tables, dealt, blocks, state.blocks - first)
                state.blocks = len(blocks)

    def forget(self, request_ids: Iterable[str]) -> None:
        """The block tables of these requests were replaced (preempted, finished): fill their rows anew."""
        left = set(request_ids)
        if left:
            self._rows = [None if row is not None and row.request_id in left else row for row in self._rows]

    def clear_rows(self, start: int) -> None:
        """Rows from ``start`` on belong to no request: their lengths must come out as the runner's own."""
        if start < self._used:
            self._rows[start : self._used] = [None] * (self._used - start)
            self._surplus[:, start : self._used] = 0
            if self._cold is not None:
                self._cold.clear(start, self._used)
            self._used = start

    def tables(self, rows: int) -> Tensor:
        """``[L, rows, H, W]`` int32, persistent memory."""
        return self._tables[:, :rows]

    def cold_held(self, request_id: str) -> ColdHeld:
        """What a request holds in cold pages; waits for the device."""
        dealt = self.requests.get(request_id)
        if dealt is None or dealt.cold is None:
            return ColdHeld(0.0, 0.0)
        pairs = dealt.counts.numel()
        return ColdHeld(dealt.cold.total / pairs, int(dealt.cold.tokens.sum()) / pairs)

    def cold(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """Cold pages ``[L, rows, H, E]`` and their counts ``[L, rows, H]``, int32; None if no page can be cold."""
        return None if self._cold is None else self._cold.of(rows)

    def seq_lens(self, nominal: Tensor) -> Tensor:
        """Hot tokens that each pair reads: ``[L, rows, H]`` int32, persistent, from nominal lengths ``[rows]``."""
        rows = nominal.shape[0]
        return torch.add(self._surplus[:, :rows], nominal.view(1, rows, 1), out=self._seq_lens[:, :rows])

    def longest(self, batch: Iterable[tuple[str, int]]) -> int:
        """Most tokens that any pair of the requests (id, nominal length) reads."""
        size = self.pool.block_size
        found = 0
        for request_id, nominal in batch:
            dealt = self.requests.get(request_id)
            found = max(found, nominal + ((dealt.widest - dealt.blocks) * size if dealt is not None else 0))
        return found

    @property
    def size_bytes(self) -> int:
        """Bytes of the batch tables."""
        cold = 0 if self._cold is None else self._cold.size_bytes
        return self._tables.nbytes + self._surplus.nbytes + self._seq_lens.nbytes + cold

    def _width(self, request_id: str, blocks: Sequence[int]) -> int:
        dealt = self.requests.get(request_id)
        return len(blocks) + (dealt.widest - dealt.blocks if dealt is not None else 0)

    def _grow(self, width: int) -> None:
        if width > self._max_width:
            raise RuntimeError(
                f"a (layer, kv head) would read {width} pages, but {self._max_width} hold every token of a request of "
                "maximal length: the page accounting is broken"
            )
        width = min(max(width, 2 * self._tables.shape[3]), self._max_width)
        self._tables = self._tables.new_zeros(*self._tables.shape[:3], width)
        self._rows = [None] * self.max_rows
