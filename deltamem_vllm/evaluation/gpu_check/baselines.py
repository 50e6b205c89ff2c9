# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What attention over dense keys and values takes: torch's, and xFormers' where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


def dense_baselines(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, group: int, dim: int, queries: int, tokens: int
) -> dict[str, Callable[[], Any]]:
    """Calls that attend as many queries to as many tokens, all of them in the model's dtype and side by side.

    Parameters
    ----------
    batch, heads, group, dim, queries, tokens : int
        Requests, kv heads, query heads for each, D, queries and tokens of a request. More than one query: causal, the
        last query seeing all tokens.
    """
    query = torch.randn(batch, heads * group, queries, dim, device=device).to(dtype)
    keys, values = (torch.randn(batch, heads, tokens, dim, device=device).to(dtype) for _ in range(2))
    mask = causal_lower_right(queries, tokens) if queries > 1 else None
    if mask is not None:
        # Under a mask of this kind torch takes FlashAttention only for as many kv heads as query heads.
        wide_keys, wide_values = (part.repeat_interleave(group, 1) for part in (keys, values))
        calls: dict[str, Callable[[], Any]] = {
            "torch SDPA": lambda: scaled_dot_product_attention(query, wide_keys, wide_values, attn_mask=mask)
        }
    else:
        calls = {"torch SDPA": lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True)}
    if find_spec("xformers") is not None:
        calls["xformers"] = _xformers(query, keys, values, group, causal=mask is not None)
    return calls


def _xformers(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: int, causal: bool
) -> Callable[[], Any]:
    """The same in xFormers' order of dimensions: [batch, tokens, kv heads, group, D]."""
    fmha = import_module("xformers.ops").fmha  # optional, so nothing that type checkers may rely on

    batch, heads, tokens, dim = keys.shape
    queries = query.view(batch, heads, group, -1, dim).permute(0, 3, 1, 2, 4).contiguous()
    shape = (batch, tokens, heads, group, dim)
    k, v = (part.transpose(1, 2).contiguous().unsqueeze(3).expand(shape) for part in (keys, values))
    bias = fmha.attn_bias.LowerTriangularFromBottomRightMask() if causal else None
    return lambda: fmha.memory_efficient_attention_forward(queries, k, v, attn_bias=bias)
