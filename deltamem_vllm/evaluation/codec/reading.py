# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A real model's cache, its newest queries, and how it goes on from any cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.attention import Recorder
from deltamem_vllm.calibration.reading import CHUNK
from deltamem_vllm.evaluation.codec.coding import Cache
from deltamem_vllm.evaluation.codec.errors import CodecError
from deltamem_vllm.evaluation.codec.settings import QUERIES


@dataclass(frozen=True)
class Read:
    """What a model had when it had read a text.

    Attributes
    ----------
    tokens : list of int
        Ids of all n tokens.
    cache : Cache
        Of all n.
    queries : Tensor
        ``[L, H_q, QUERIES, D]`` float32: the last ones, after RoPE, times the scale of the logits.
    """

    tokens: list[int]
    cache: Cache
    queries: Tensor


class Watcher(Recorder):
    """Calibration's attention, which also notes the newest queries."""

    def __init__(self) -> None:
        super().__init__()
        self._queries: dict[int, Tensor] = {}

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
        """transformers' attention interface; see `Recorder`."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = module.layer_idx
        assert isinstance(layer, int)
        newest = query[0, :, -QUERIES:].float().cpu() * scale
        # A text's last piece may be shorter than what is wanted.
        before = self._queries.get(layer, newest[:, :0])
        self._queries[layer] = torch.cat([before, newest], 1)[:, -QUERIES:]
        return super().attend(module, query, key, value, attention_mask, scaling, dropout, **options)

    def newest(self) -> Tensor:
        """The last queries, ``[L, H_q, QUERIES, D]``; forgets them."""
        found, self._queries = self._queries, {}
        return torch.stack([found[layer] for layer in sorted(found)])


@torch.inference_mode()
def read(model: Any, watcher: Watcher, tokens: list[int]) -> Read:
    """Let a model, which attends through `watcher`, read a text.

    Raises
    ------
    CodecError
        Keys and values, or layers, differ in their shapes.
    """
    from transformers import DynamicCache

    held = DynamicCache(config=model.config)
    for start in range(0, len(tokens), CHUNK):
        ids = torch.tensor([tokens[start : start + CHUNK]], device=model.device)
        model.base_model(input_ids=ids, past_key_values=held, use_cache=True)
    shapes = {tuple(part.shape) for layer in held.layers for part in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise CodecError(f"keys and values of {type(model).__name__} have shapes {sorted(shapes)}; cold pages need one")
    keys, values = (
        torch.stack([getattr(layer, name)[0].float().cpu() for layer in held.layers]) for name in ("keys", "values")
    )
    return Read(tokens, Cache(keys, values), watcher.newest())


@torch.inference_mode()
def go_on(model: Any, cache: Cache, tokens: list[int]) -> Tensor:
    """Log-probs after each of the tokens that follow what is in a cache: ``[len(tokens), vocabulary]`` float32."""
    from transformers import DynamicCache

    held = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        held.update(*(part.unsqueeze(0).to(model.device, model.dtype) for part in (keys, values)), layer)
    ids = torch.tensor([tokens], device=model.device)
    logits: Tensor = model(input_ids=ids, past_key_values=held, use_cache=True).logits
    return logits[0].float().log_softmax(-1).cpu()
