# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which pages a compaction dealt, and what the cold ones hold: as a worker has it, in plain tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cold_bytes import capacity
from torch import Tensor


@dataclass(frozen=True)
class RecordedPages:
    """What one compaction dealt. Everything but ``targets`` is a list ``[layer][kv head]``.

    Attributes
    ----------
    bits: of an element in a cold page; 0 if no page may be cold.
    head_size: D.
    targets: of each rank, the page numbers of the blocks it was given.
    hot: ``[n]`` page numbers, in token order.
    cold: ``[e]`` page numbers as attention is told of them, new ones first.
    made: of each new cold page its tokens, ``[t]`` int64 indices of tokens that were in hot pages.
    stay: ``[e']`` bool, which of the cold pages before it stayed.
    raw: ``[e, page_bytes]`` uint8, what ``cold`` held after the compaction.
    """

    bits: int
    head_size: int
    targets: list[Tensor]
    hot: list[list[Tensor]]
    cold: list[list[Tensor]] = field(default_factory=list)
    made: list[list[list[Tensor]]] = field(default_factory=list)
    stay: list[list[Tensor]] = field(default_factory=list)
    raw: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def of_worker(cls, tables: Any, plan: Any, bits: int) -> RecordedPages:
        """The hot pages, right after a compaction with dealt pages."""
        dealt, pool = tables.requests[plan.request_id], tables.pool
        targets = pool.ids(torch.tensor(plan.target_blocks)).flatten().long()
        return cls(bits, pool.head_size, [targets], _rows(dealt.pages, dealt.counts))

    def with_cold(self, tables: Any, plan: Any, choice: Any) -> RecordedPages:
        """The cold ones besides."""
        cold, pool = tables.requests[plan.request_id].cold, tables.pool
        layers, heads = choice.made.shape
        pages = _rows(cold.pages, cold.counts)
        flat = pool.flat.view(torch.uint8)
        made: list[list[list[Tensor]]] = [[[] for _ in range(heads)] for _ in range(layers)]
        for pair, tokens, count in zip(choice.pair.tolist(), choice.tokens, choice.counts.tolist(), strict=True):
            made[pair // heads][pair % heads].append(tokens[:count].long().clone())
        nothing = torch.zeros(layers, heads, 0, dtype=torch.bool)
        stay = [[row.clone() for row in layer] for layer in (nothing if choice.stay is None else choice.stay)]
        raw = [[flat[row] for row in layer] for layer in pages]
        return replace(self, cold=pages, made=made, stay=stay, raw=raw)

    @classmethod
    def of_ranks(cls, ranks: list[RecordedPages]) -> RecordedPages:
        """Ranks side by side: each has kv heads of its own, and page numbers of its own."""
        parts: dict[str, Any] = {}
        for name in ("hot", "cold", "made", "stay", "raw"):
            parts[name] = [sum(layer, []) for layer in zip(*(getattr(rank, name) for rank in ranks), strict=True)]
        return cls(ranks[0].bits, ranks[0].head_size, [rank.targets[0] for rank in ranks], **parts)

    @classmethod
    def load(cls, path: Path) -> RecordedPages:
        """What `save` wrote."""
        return cls(**torch.load(path))

    def save(self, path: Path) -> None:
        """Write it to ``path``."""
        torch.save(asdict(self), path)

    def counts(self, before: RecordedPages | None) -> dict[str, int]:
        """Cold pages of this compaction by what became of them, and tokens in them.

        Parameters
        ----------
        before: the request's compaction before it, since it (re)started.
        """
        pages = [raw for layer in self.raw for rows in layer for raw in rows]
        made = [len(tokens) for layer in self.made for rows in layer for tokens in rows]
        kept = sum(int(stay.sum()) for layer in self.stay for stay in layer)
        old = 0 if before is None else sum(len(rows) for layer in before.cold for rows in layer)
        most = capacity(self.bits, self.head_size, len(pages[0])) if pages else 0
        return {
            "cold_made": len(made),
            "cold_partial": sum(tokens < most for tokens in made),
            "cold_kept": kept,
            "cold_dropped": old - kept,
            "cold_tokens": sum(int(raw[:4].view(torch.int32)) for raw in pages),
        }


def _rows(pages: Tensor, counts: Tensor) -> list[list[Tensor]]:
    """``[L, H, E]``, of which each pair uses the first ``counts[l, h]``."""
    return [
        [row[:count].long().clone() for row, count in zip(layer, used.tolist(), strict=True)]
        for layer, used in zip(pages, counts, strict=True)
    ]
