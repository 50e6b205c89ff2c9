# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention of KVzip's second pass: as `calibration.attention`, without allocations, for one pass after another.

A pass over a prompt looks at ten thousand pieces of weights. Made anew each time, as there, they cost three times what
is computed with them; here they are written into the same memory, small enough for a core's cache.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.attention import refuse_other_attention
from deltamem_vllm.calibration.errors import CalibrationError

_PIECE_ELEMENTS = 1 << 19
_NUMBERS = itertools.count()


class WatchedAttention:
    """Causal attention of one sequence; while watching, the largest weight that each of its first entries gets.

    The maximum is over the queries since `watch` and over the query heads that share a kv head. A weight is a share
    among everything that its query sees.
    """

    def __init__(self) -> None:
        self._watched = 0
        self._peaks: dict[int, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def register(self) -> str:
        """Become one of transformers' attention implementations and return its name, this object's own."""
        from transformers import AttentionInterface

        name = f"deltamem_kvzip_{next(_NUMBERS)}"
        AttentionInterface.register(name, self.attend)
        return name

    def watch(self, entries: int) -> None:
        """Forget what was seen and watch the first positions from now on; 0 stops."""
        self._watched, self._peaks = entries, {}

    def peaks(self) -> Tensor:
        """What was seen, [layers, kv heads, entries] float32 on the CPU; stops watching.

        Raises
        ------
        CalibrationError
            No layer came by here.
        """
        if not self._peaks:
            raise CalibrationError(
                "the model does not attend through transformers' attention interface; leave kvzip out of the grid"
            )
        found = torch.stack([self._peaks[layer].cpu() for layer in sorted(self._peaks)])
        self.watch(0)
        return found

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """transformers' interface: query [1, H, q, D]; key, value [1, H_kv, n, D]; returns [1, q, H, D].

        The queries are the last q of the n positions.

        Raises
        ------
        CalibrationError
            The model wants attention other than causal over everything.
        """
        del dropout  # zero in evaluation mode
        refuse_other_attention(module, query, key, attention_mask, options)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        peak = None
        if self._watched:
            layer = module.layer_idx
            assert isinstance(layer, int)
            if layer not in self._peaks:
                self._peaks[layer] = torch.zeros(key.shape[1], self._watched, device=key.device)
            peak = self._peaks[layer]
        out = self._attend(query[0], key[0], value[0], scale, peak)
        return out.transpose(0, 1).unsqueeze(0), None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, peak: Tensor | None) -> Tensor:
        """query [H, q, D]; key, value [H_kv, n, D]; peak [H_kv, entries] is updated. Returns [H, q, D]."""
        heads, queries, dim = query.shape
        kv_heads, length, _ = key.shape
        group = heads // kv_heads
        grouped = query.reshape(kv_heads, group, queries, dim)
        out = torch.empty_like(grouped)
        rows = max(1, _PIECE_ELEMENTS // (group * length))
        for start in range(0, queries, rows):
            part = slice(start, min(start + rows, queries))
            first = length - queries + start
            for head in range(kv_heads):
                asked = grouped[head, :, part].reshape(-1, dim)
                logits = self._buffer("logits", asked.shape[0], length, query)
                exact = self._buffer("exact", asked.shape[0], length, query, torch.float32)
                torch.mm(asked, key[head].T, out=logits)
                exact.copy_(logits).mul_(scale)
                # A query sees all before its piece, and of the piece what is not after it.
                later = exact.view(group, -1, length)[..., first:]
                later.masked_fill_(_unseen(later.shape[1], later.shape[2], query.device), float("-inf"))
                weights = self._buffer("weights", asked.shape[0], length, query, torch.float32)
                torch.softmax(exact, -1, out=weights)
                if peak is not None:
                    torch.maximum(peak[head], weights[:, : peak.shape[1]].amax(0), out=peak[head])
                logits.copy_(weights)
                out[head, :, part] = torch.mm(logits, value[head]).view(group, -1, dim)
        return out.view(heads, queries, dim)

    def _buffer(self, name: str, rows: int, columns: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        wanted, size = dtype or like.dtype, rows * columns
        known = self._buffers.get(name)
        if known is None or known.numel() < size or known.dtype != wanted or known.device != like.device:
            known = self._buffers[name] = torch.empty(size, dtype=wanted, device=like.device)
        return known[:size].view(rows, columns)


def _unseen(queries: int, entries: int, device: torch.device) -> Tensor:
    """[queries, entries] bool: which of the entries from the first query on a query must not see."""
    return torch.arange(entries, device=device) > torch.arange(queries, device=device).unsqueeze(1)
