# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a cold page is, one element at a time: slow, obvious, and the definition for every faster version.

Written from the description of the format in `codec/cold_page.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat

_F32 = np.float32
_LARGEST = _F32(65504.0)  # of float16


def encode_page(cold: ColdFormat, keys: Tensor, values: Tensor, count: int) -> bytes:
    """The page of the first ``count`` tokens.

    Parameters
    ----------
    cold: format of the page.
    keys, values: ``[>= count, D]`` float.
    count: 1 to C.
    """
    page = bytearray(cold.page_bytes)
    page[0:4] = count.to_bytes(4, "little")
    k, v = (part.detach().float().numpy() for part in (keys, values))
    for channel in range(cold.head_size):
        scale, zero, codes = _code([k[t, channel] for t in range(count)], cold.bits)
        page[cold.key_scale + 2 * channel : cold.key_scale + 2 * channel + 2] = scale.tobytes()
        page[cold.key_zero + 2 * channel : cold.key_zero + 2 * channel + 2] = zero.tobytes()
        for t, code in enumerate(codes):
            byte, shift = _place(t, cold.key_row_bytes, cold.bits)
            page[cold.key_codes + channel * cold.key_row_bytes + byte] |= code << shift
    for t in range(count):
        scale, zero, codes = _code([v[t, channel] for channel in range(cold.head_size)], cold.bits)
        page[cold.value_scale + 2 * t : cold.value_scale + 2 * t + 2] = scale.tobytes()
        page[cold.value_zero + 2 * t : cold.value_zero + 2 * t + 2] = zero.tobytes()
        for channel, code in enumerate(codes):
            byte, shift = _place(channel, cold.value_row_bytes, cold.bits)
            page[cold.value_codes + t * cold.value_row_bytes + byte] |= code << shift
    return bytes(page)


def decode_page(cold: ColdFormat, page: bytes) -> tuple[Tensor, Tensor, int]:
    """Keys and values, ``[C, D]`` float32 with zeros past the page's tokens, and their number, 0 to C."""
    count = min(max(int.from_bytes(page[0:4], "little", signed=True), 0), cold.capacity)
    keys, values = torch.zeros(cold.capacity, cold.head_size), torch.zeros(cold.capacity, cold.head_size)

    def number(offset: int) -> np.float32:
        return _F32(np.frombuffer(page[offset : offset + 2], dtype=np.float16)[0])

    def code(row: int, row_bytes: int, index: int) -> np.float32:
        byte, shift = _place(index, row_bytes, cold.bits)
        return _F32(page[row + byte] >> shift & (2**cold.bits - 1))

    with np.errstate(all="ignore"):
        for t in range(count):
            for d in range(cold.head_size):
                k = code(cold.key_codes + d * cold.key_row_bytes, cold.key_row_bytes, t)
                keys[t, d] = float(number(cold.key_zero + 2 * d) + k * number(cold.key_scale + 2 * d))
                v = code(cold.value_codes + t * cold.value_row_bytes, cold.value_row_bytes, d)
                values[t, d] = float(number(cold.value_zero + 2 * t) + v * number(cold.value_scale + 2 * t))
    return keys, values, count


def _code(numbers: list[np.float32], bits: int) -> tuple[np.float16, np.float16, list[int]]:
    """Scale, zero and codes of numbers that share them."""
    most = 2**bits - 1
    if any(np.isnan(x) for x in numbers):
        return np.float16(0), np.float16(0), [0] * len(numbers)
    with np.errstate(all="ignore"):
        zero = np.float16(min(max(min(numbers) + _F32(0), -_LARGEST), _LARGEST))  # + 0: a zero without its sign
        reach = max(max(numbers) - _F32(zero), _F32(0)) + _F32(0)
        scale = np.float16(min(reach / _F32(most), _LARGEST))
        if scale == 0:
            return scale, zero, [0] * len(numbers)
        # rint: ties to even.
        codes = [min(max(np.rint((x - _F32(zero)) / _F32(scale)), 0), most) for x in numbers]
    return scale, zero, [int(code) for code in codes]


def _place(index: int, row_bytes: int, bits: int) -> tuple[int, int]:
    """Byte of a row and shift in it of code ``index``: the row's parts lie over each other, not side by side."""
    return index % row_bytes, index // row_bytes * bits
