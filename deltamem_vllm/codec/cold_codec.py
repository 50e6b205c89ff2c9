# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Write tokens into cold pages and read them back, in plain torch on any device.

The native versions (`ops/`) give the same bytes; the slow, obvious definition is in `ops/reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat

_LARGEST = torch.finfo(torch.float16).max


def encode_pages(layout: ColdFormat, keys: Tensor, values: Tensor, counts: Tensor) -> Tensor:
    """Cold pages with these tokens.

    Every scale and zero is rounded to float16 first and the codes are chosen for the rounded ones, so that the error
    is at most half a step, plus what rounding the zero cuts off at the ends of the range.

    Parameters
    ----------
    layout: of the pages.
    keys, values: ``[p, C, D]`` float; what stands past a page's tokens is ignored.
    counts: ``[p]`` int64, tokens of each page, 1 to C.

    Returns
    -------
    ``[p, page_bytes]`` uint8. Codes and parameters past the last token, and bytes that nothing uses, are 0.

    Raises
    ------
    ValueError: shapes do not fit the layout.
    """
    pages, capacity, dim = keys.shape
    if (capacity, dim) != (layout.capacity, layout.head_size) or values.shape != keys.shape:
        raise ValueError(
            f"cold pages hold [p, {layout.capacity}, {layout.head_size}] keys and values, "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    there = (torch.arange(capacity, device=keys.device) < counts.unsqueeze(1)).unsqueeze(2)
    raw = torch.zeros(pages, layout.page_bytes, dtype=torch.uint8, device=keys.device)
    raw[:, :4] = counts.to(torch.int32).unsqueeze(1).view(torch.uint8)
    k_codes, k_scale, k_zero = _quantise(keys.float(), there, 1, layout.bits)
    v_codes, v_scale, v_zero = _quantise(values.float(), there, 2, layout.bits)
    for offset, parameters in (
        (layout.key_scale, k_scale[:, 0]),
        (layout.key_zero, k_zero[:, 0]),
        (layout.value_scale, v_scale[..., 0]),
        (layout.value_zero, v_zero[..., 0]),
    ):
        raw[:, offset : offset + 2 * parameters.shape[1]] = parameters.contiguous().view(torch.uint8)
    key_bytes = _pack(k_codes.transpose(1, 2), layout.bits).flatten(1)
    value_bytes = _pack(v_codes, layout.bits).flatten(1)
    raw[:, layout.key_codes : layout.key_codes + key_bytes.shape[1]] = key_bytes
    raw[:, layout.value_codes : layout.value_codes + value_bytes.shape[1]] = value_bytes
    return raw


def decode_pages(layout: ColdFormat, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of cold pages.

    Parameters
    ----------
    layout: of the pages.
    raw: ``[p, page_bytes]`` uint8.

    Returns
    -------
    Keys and values, ``[p, C, D]`` float32, zeros past a page's tokens, and the tokens of each page, ``[p]`` int64: what
    the header says, but no less than 0 and no more than C.
    """
    if raw.dim() != 2 or raw.shape[1] != layout.page_bytes or raw.dtype != torch.uint8:
        raise ValueError(f"cold pages are uint8 [p, {layout.page_bytes}], got {raw.dtype} {tuple(raw.shape)}")
    capacity, dim = layout.capacity, layout.head_size
    counts = raw[:, :4].contiguous().view(torch.int32)[:, 0].long().clamp(0, capacity)

    def parameters(offset: int, count: int) -> Tensor:
        return raw[:, offset : offset + 2 * count].contiguous().view(torch.float16).float()

    def codes(offset: int, rows: int, row_bytes: int) -> Tensor:
        packed = raw[:, offset : offset + rows * row_bytes].view(-1, rows, row_bytes)
        return _unpack(packed, layout.bits).float()

    keys = codes(layout.key_codes, dim, layout.key_row_bytes).transpose(1, 2)
    keys = parameters(layout.key_zero, dim).unsqueeze(1) + keys * parameters(layout.key_scale, dim).unsqueeze(1)
    values = codes(layout.value_codes, capacity, layout.value_row_bytes)
    scale, zero = parameters(layout.value_scale, capacity), parameters(layout.value_zero, capacity)
    values = zero.unsqueeze(2) + values * scale.unsqueeze(2)
    absent = (torch.arange(capacity, device=raw.device) >= counts.unsqueeze(1)).unsqueeze(2)
    return keys.masked_fill(absent, 0.0), values.masked_fill(absent, 0.0), counts


def _quantise(tokens: Tensor, there: Tensor, along: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8), scale and zero (float16) of ``[p, C, D]``; the range is taken over dimension ``along``."""
    low = torch.where(there, tokens, torch.inf).amin(along, keepdim=True)
    high = torch.where(there, tokens, -torch.inf).amax(along, keepdim=True)
    # Adding 0.0: which zero a reduction finds first would decide the sign of -0.0.
    zero = (torch.where(low <= high, low, 0.0) + 0.0).clamp(-_LARGEST, _LARGEST).half()
    reach = torch.where(low <= high, high - zero.float(), 0.0).clamp(min=0.0) + 0.0
    scale = (reach / (2**bits - 1)).clamp(max=_LARGEST).half()
    # A range too small for float16 has scale 0: every code is 0 and stands for the zero.
    step = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((tokens - zero.float()) / step).round_().clamp_(0, 2**bits - 1)
    return torch.where(there & (scale > 0), codes, 0.0).to(torch.uint8), scale, zero


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Rows of n codes (uint8) as rows of ``n * bits / 8`` bytes."""
    parts = codes.reshape(*codes.shape[:-1], 8 // bits, codes.shape[-1] * bits // 8).unbind(-2)
    packed: Tensor = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (bits * place)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The reverse of `_pack`."""
    parts = [(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.cat(parts, dim=-1)
