# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Where a backend puts a token inside a page.

A page is one kv head's ``block_size`` slots of one layer: ``block_size * 2 * D`` elements. Backends order them
differently (vLLM's CPU kernels keep keys transposed, or in tiles), so nothing here assumes an order: the layout is
read off the backend's own writer once, at start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Probe values must be exact in every cache dtype: bfloat16 holds integers up to 256, float16 more.
_DIGIT = 16

WritePage = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(key [T, H, D], value [T, H, D], cache [1, H, block_size, 2 * D], slots [T]) -> None: the backend's writer."""


@dataclass(frozen=True)
class PageLayout:
    """Element offsets inside a page.

    Attributes
    ----------
    keys, values: ``[block_size, D]`` int64, offset of (slot, dim) in the page read as ``block_size * 2 * D`` elements.
    """

    keys: Tensor
    values: Tensor

    @property
    def block_size(self) -> int:
        """Slots of a page."""
        return self.keys.shape[0]

    @property
    def head_size(self) -> int:
        """D, elements of one key or value."""
        return self.keys.shape[1]

    def strides(self, part: str) -> tuple[int, int, int] | None:
        """``(base, slot stride, dim stride)`` of ``"keys"`` or ``"values"`` if offsets are affine, else None."""
        offsets: Tensor = getattr(self, part)
        base = int(offsets[0, 0])
        slot = int(offsets[1, 0]) - base if offsets.shape[0] > 1 else 1
        dim = int(offsets[0, 1]) - base if offsets.shape[1] > 1 else 1
        rows = torch.arange(offsets.shape[0]).unsqueeze(1) * slot
        cols = torch.arange(offsets.shape[1]).unsqueeze(0) * dim
        return (base, slot, dim) if torch.equal(offsets.cpu(), rows + cols + base) else None


def probe_layout(write: WritePage, cache: Tensor) -> PageLayout:
    """Learn a layout by writing numbered tokens through the backend's own writer into a scratch page.

    Parameters
    ----------
    write: the backend's writer.
    cache: ``[num_blocks, H, block_size, 2 * D]``, one layer's cache; only its shape, dtype and device are used.

    Raises
    ------
    RuntimeError: the writer does not place every element of every token at exactly one offset.
    """
    _, heads, block_size, width = cache.shape
    dim = width // 2
    slot_ids = torch.arange(block_size).view(block_size, 1).expand(block_size, dim)
    dim_ids = torch.arange(dim).view(1, dim).expand(block_size, dim)
    # A number per element, written in digits: value elements count on after the keys.
    number = slot_ids * dim + dim_ids
    digits = 1
    while _DIGIT**digits < block_size * width:
        digits += 1
    page = torch.zeros(block_size * width, dtype=torch.int64)
    slots = torch.arange(block_size, device=cache.device)
    for place in range(digits):
        scratch = torch.zeros(1, heads, block_size, width, dtype=cache.dtype, device=cache.device)
        parts = [
            ((n // _DIGIT**place) % _DIGIT)
            .to(device=cache.device, dtype=cache.dtype)
            .unsqueeze(1)
            .expand(block_size, heads, dim)
            .contiguous()
            for n in (number, number + block_size * dim)
        ]
        write(parts[0], parts[1], scratch, slots)
        page += scratch[0, 0].reshape(-1).float().cpu().long() * _DIGIT**place
    order = page.argsort()
    if not torch.equal(page[order], torch.arange(page.numel())):
        raise RuntimeError(
            "the attention backend's KV cache writer does not store each element of a token exactly once "
            f"(page of {block_size} x {width}); this cache layout is not supported by deltamem"
        )
    half = block_size * dim
    return PageLayout(
        keys=order[:half].view(block_size, dim).to(cache.device),
        values=order[half:].view(block_size, dim).to(cache.device),
    )
