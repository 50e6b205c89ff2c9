# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A whole cache coded by a scheme and decoded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.codec.layer_maps import Code, LayerMaps, code_by_layers
from deltamem_vllm.codec.references import from_page_mean, from_previous_token
from deltamem_vllm.codec.rounding import Along, rounded
from deltamem_vllm.evaluation.codec.rotation import Rotation
from deltamem_vllm.evaluation.codec.schemes import Coding, Layout, layer_bits


@dataclass(frozen=True)
class Cache:
    """What a model has in its cache.

    Attributes
    ----------
    keys, values : Tensor
        ``[L, H, n, D]`` float32 on the CPU; keys after RoPE.
    """

    keys: Tensor
    values: Tensor

    def first(self, count: int) -> Cache:
        """The first tokens."""
        return Cache(self.keys[:, :, :count], self.values[:, :, :count])

    def part(self, first: int) -> Cache:
        """The tokens from `first` on."""
        return Cache(self.keys[:, :, first:], self.values[:, :, first:])

    def behind(self, front: Cache) -> Cache:
        """These tokens behind others."""
        keys, values = ((front.keys, self.keys), (front.values, self.values))
        return Cache(torch.cat(keys, 2), torch.cat(values, 2))


@dataclass(frozen=True)
class Between:
    """What the reference "layer" needs.

    Attributes
    ----------
    maps : LayerMaps
        Fitted for this very layout.
    rotation : Rotation
        Of the model.
    """

    maps: LayerMaps
    rotation: Rotation


def code(layout: Layout, cache: Cache, between: Between | None = None, first: int = 0) -> Cache:
    """What decodes from all tokens of a cache, in pages filled in their order.

    Parameters
    ----------
    layout : Layout
        Scheme, bits and pages.
    cache : Cache
        The tokens.
    between : Between or None
        Where the scheme's reference is "layer".
    first : int
        Position of the first token.
    """
    if layout.scheme.reference == "layer":
        if between is None:
            raise ValueError("the reference 'layer' needs maps")
        rows = to_rows(cache, between.rotation, first)
        heads, dim = cache.keys.shape[1], cache.keys.shape[3]
        decoded = code_by_layers(between.maps, rows, layer_coder(layout, heads))
        return from_rows(decoded, heads, dim, between.rotation, first)
    keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
    if layout.written:
        coded = _written(layout, keys, values)
    else:
        coded = (
            coded_pages(layout.scheme.keys, keys, layout.bits, layout.capacity),
            coded_pages(layout.scheme.values, values, layout.bits, layout.capacity),
        )
    return Cache(coded[0].view_as(cache.keys), coded[1].view_as(cache.values))


def random_codes(layout: Layout, cache: Cache, seed: int) -> Cache:
    """The cache with right scales and zeros, and codes that are drawn: a control."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for coding, tokens in ((layout.scheme.keys, cache.keys), (layout.scheme.values, cache.values)):
        pages, there = to_pages(tokens.flatten(0, 1), layout.capacity)
        out = rounded(pages, there, coding.along, layout.bits, generator)
        drawn.append(from_pages(out, tokens.shape[2]).view_as(tokens))
    return Cache(*drawn)


def to_rows(cache: Cache, rotation: Rotation, first: int = 0) -> Tensor:
    """All a layer holds of a token beside each other: ``[L, n, H * 2 * D]``, keys before RoPE, then values."""
    both = torch.cat([rotation.undo(cache.keys, first), cache.values], 1)
    return both.transpose(1, 2).flatten(2)


def from_rows(rows: Tensor, heads: int, dim: int, rotation: Rotation, first: int = 0) -> Cache:
    """The reverse of `to_rows`."""
    both = rows.reshape(*rows.shape[:2], 2 * heads, dim).transpose(1, 2)
    return Cache(rotation.apply(both[:, :heads], first), both[:, heads:].contiguous())


def layer_coder(layout: Layout, heads: int) -> Code:
    """Codes a layer's rows, ``[n, H * 2 * D]``, in pages of each head."""
    plain = {
        part: Coding("none", coding.along) for part, coding in enumerate((layout.scheme.keys, layout.scheme.values))
    }

    def coded(layer: int, rows: Tensor) -> Tensor:
        own = replace(layout, bits=layer_bits(layout.scheme.reference, layer, layout.bits))
        tokens = rows.reshape(-1, 2 * heads, layout.dim).transpose(0, 1)
        parts = [
            coded_pages(plain[part], tokens[part * heads : (part + 1) * heads], own.bits, own.capacity)
            for part in plain
        ]
        return torch.cat(parts).transpose(0, 1).flatten(1)

    return coded


def coded_pages(coding: Coding, tokens: Tensor, bits: int, capacity: int) -> Tensor:
    """What decodes from ``[h, n, D]`` tokens, in pages of ``capacity`` tokens; see `Coding`."""
    pages, there = to_pages(tokens, capacity)
    coder = _CODERS[coding.reference]
    return from_pages(coder(pages, there, coding.along, bits), tokens.shape[1])


def to_pages(tokens: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[h, n, D]`` in pages, ``[h * p, capacity, D]``, and where in them tokens are, ``[h * p, capacity]``."""
    heads, count, dim = tokens.shape
    pages = -(-count // capacity)
    padded = pad(tokens, (0, 0, 0, pages * capacity - count)).reshape(heads * pages, capacity, dim)
    there = (torch.arange(pages * capacity) < count).view(pages, capacity).repeat(heads, 1)
    return padded, there


def from_pages(pages: Tensor, count: int) -> Tensor:
    """The reverse of `to_pages`: ``[h, count, D]``."""
    capacity, dim = pages.shape[1:]
    return pages.reshape(-1, -(-count // capacity) * capacity, dim)[:, :count]


def _written(layout: Layout, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``[h, n, D]`` keys and values through the bytes of cold pages."""
    served = ColdFormat(layout.bits, layout.dim, layout.page_bytes)
    assert served.capacity == layout.capacity
    (key_pages, there), (value_pages, _) = to_pages(keys, served.capacity), to_pages(values, served.capacity)
    raw = encode_pages(served, key_pages, value_pages, there.sum(1))
    decoded_keys, decoded_values, _ = decode_pages(served, raw)
    return from_pages(decoded_keys, keys.shape[1]), from_pages(decoded_values, keys.shape[1])


_CODERS: Final[dict[str, Callable[[Tensor, Tensor, Along, int], Tensor]]] = {
    "none": rounded,
    "page": from_page_mean,
    "token": from_previous_token,
}
