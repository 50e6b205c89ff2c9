# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What coding loses: in a token, in attention's output, and in the model's next words."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.calibration.attention import attend_and_peak
from deltamem_vllm.evaluation.codec.coding import Cache


def relative_error(exact: Tensor, decoded: Tensor) -> float:
    """Mean over layers, heads and tokens of |x - x'| / |x|; ``[L, H, n, D]`` both."""
    return float(((exact - decoded).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-12)).mean())


def attention_outputs(queries: Tensor, cache: Cache) -> Tensor:
    """Causal attention of the last q of the n tokens of a cache.

    Parameters
    ----------
    queries : Tensor
        ``[L, H_q, q, D]``, times the scale of the logits.
    cache : Cache
        All n tokens.

    Returns
    -------
    Tensor
        ``[L, H_q, q, D]``.
    """
    layers = zip(queries, cache.keys, cache.values, strict=True)
    return torch.stack([attend_and_peak(asked, keys, values, 1.0, range(0))[0] for asked, keys, values in layers])


def output_change(exact: Tensor, changed: Tensor) -> Tensor:
    """Mean over heads and queries of |o - o'| / |o|, by layer; ``[L, H_q, q, D]`` both, ``[L]`` back."""
    change: Tensor = (exact - changed).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-12)
    return change.mean((1, 2))


def divergence(exact: Tensor, changed: Tensor) -> float:
    """Mean over tokens of the Kullback-Leibler divergence of log-probs ``[tokens, vocabulary]``, in nats."""
    wide = exact.double()
    return float((wide.exp() * (wide - changed.double())).sum(-1).mean())
