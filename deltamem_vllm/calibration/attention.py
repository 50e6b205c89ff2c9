# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention for transformers that records the most any query looked at each entry, in bounded memory.

It takes part through transformers' attention interface, after rotary positions and the KV cache, so it is the
same for every architecture that uses that interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deltamem_vllm.calibration.errors import CalibrationError

NAME = "deltamem_calibration"
"""Under which the recorder is registered as `attn_implementation`."""

# Weights of one piece of queries: 32 MiB in float32, whatever the context and the number of heads.
_PIECE_ELEMENTS = 1 << 23

# What a model may ask of attention that changes the weights. vLLM has its own refusals for these models.
_UNSERVED = ("sliding_window", "softcap", "s_aux", "position_bias", "sinks")


class Recorder:
    """Computes causal attention of one sequence, and the maximum weight of its entries while asked to.

    The weight of an entry is its softmax share among everything the query sees. The maximum is over all
    queries since `start` and over the query heads that share the entry's kv head.

    Attributes
    ----------
    modules : dict of int to Module
        The attention of each layer, since it was recorded for the first time.
    """

    def __init__(self) -> None:
        self.modules: dict[int, torch.nn.Module] = {}
        self._peaks: dict[int, Tensor] = {}
        self._entries: range | None = None

    def register(self) -> None:
        """Become transformers' attention implementation `NAME`; an earlier recorder loses the name."""
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, self.attend)

    def start(self, entries: range) -> None:
        """Forget what was recorded and watch these positions from now on."""
        self._peaks, self._entries = {}, entries

    def finish(self) -> Tensor:
        """Stop recording and return the maxima, [layers, kv heads, entries] float32 on the CPU.

        Raises
        ------
        CalibrationError
            A layer did not come by here, or layers differ in their kv heads.
        """
        peaks, self._peaks, self._entries = self._peaks, {}, None
        shapes = {tuple(peak.shape) for peak in peaks.values()}
        if not peaks or sorted(peaks) != list(range(len(peaks))) or len(shapes) != 1:
            raise CalibrationError(
                f"attention was seen in layers {sorted(peaks)} with shapes {sorted(shapes)}; supported: full attention "
                "through transformers' attention interface, with one number of kv heads in every layer"
            )
        return torch.stack([peaks[layer].cpu() for layer in sorted(peaks)])

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
        """transformers' attention interface: query [1, H, q, D]; key, value [1, H_kv, n, D]; returns [1, q, H, D].

        The queries are the last q of the n positions. The mask is made here: transformers makes none for an
        implementation that it does not know, and one sequence without padding needs no other.
        """
        del dropout  # zero in evaluation mode
        refuse_other_attention(module, query, key, attention_mask, options)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self._entries is None:
            mask = _visible(query.shape[2], key.shape[2], 0, query.shape[2], query.device)
            out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
            return out.transpose(1, 2).contiguous(), None
        layer = module.layer_idx
        assert isinstance(layer, int)
        out, peak = attend_and_peak(query[0], key[0], value[0], scale, self._entries)
        self.modules[layer] = module
        before = self._peaks.get(layer)
        self._peaks[layer] = peak if before is None else torch.maximum(before, peak)
        return out.transpose(0, 1).unsqueeze(0).contiguous(), None


def refuse_other_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> None:
    """Check what transformers passes to an attention implementation.

    Raises
    ------
    CalibrationError
        The model wants attention other than causal over everything, or of more than one sequence.
    """
    unserved = [name for name in _UNSERVED if options.get(name) is not None]
    if unserved or attention_mask is not None or query.shape[0] != 1 or query.shape[1] % key.shape[1]:
        raise CalibrationError(
            f"{type(module).__name__} calls attention with {', '.join(unserved) or 'a mask or batch of its own'}; "
            "supported: plain causal attention over the whole context"
        )


def attend_and_peak(
    query: Tensor, key: Tensor, value: Tensor, scale: float, entries: range, piece_elements: int = _PIECE_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Causal attention and the largest weight each of `entries` gets.

    Parameters
    ----------
    query : Tensor
        [H, q, D], of the last q of n positions.
    key, value : Tensor
        [H_kv, n, D]; H is a multiple of H_kv, and query head i reads kv head i // (H / H_kv).
    scale : float
        Of the logits.
    entries : range
        Positions to watch, a range with step 1 inside n.
    piece_elements : int
        Most attention weights held at once.

    Returns
    -------
    tuple of Tensor
        The output [H, q, D] in the query's dtype; the maxima [H_kv, len(entries)] float32.
    """
    heads, queries, dim = query.shape
    kv_heads, length, _ = key.shape
    grouped = query.reshape(kv_heads, heads // kv_heads, queries, dim)
    out = torch.empty_like(grouped)
    peak = torch.zeros(kv_heads, len(entries), device=query.device)
    rows = max(1, piece_elements // (heads * length))
    for start in range(0, queries, rows):
        part = slice(start, min(start + rows, queries))
        # One product per kv head: one per query head would copy the keys for each of them.
        asking = grouped[:, :, part].reshape(kv_heads, -1, dim)
        logits = torch.bmm(asking, key.mT).float().mul_(scale).view(kv_heads, heads // kv_heads, -1, length)
        logits.masked_fill_(~_visible(queries, length, part.start, part.stop, query.device), float("-inf"))
        weights = logits.softmax(-1)
        read = torch.bmm(weights.to(value.dtype).view(kv_heads, -1, length), value)
        out[:, :, part] = read.view(kv_heads, heads // kv_heads, -1, dim)
        peak = torch.maximum(peak, weights[..., entries.start : entries.stop].amax((1, 2)))
    return out.reshape(heads, queries, dim), peak


def _visible(queries: int, length: int, first: int, last: int, device: torch.device) -> Tensor:
    """Which of `length` positions queries first..last-1 of the `queries` at the end may see: [last - first, length]."""
    position = torch.arange(length - queries + first, length - queries + last, device=device)
    return torch.arange(length, device=device) <= position[:, None]
