# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The bytes of cold pages, read once more: from the format's description alone, to judge those who write and read them.

    bytes                  what
    16                     int32 number of tokens n, zeros
    2 * D, 2 * D           float16 scale and zero of each key channel
    2 * C, 2 * C           float16 scale and zero of each value
    D * C * bits / 8       key codes, channel by channel
    C * D * bits / 8       value codes, token by token

A row of r bytes holds ``8 / bits`` codes in each of them: code i in byte ``i % r``, at bit ``i // r * bits``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The engine's keys and values against the reference's own: float32 in another order of additions.
_NOISE = 1e-4
_HALF = 2.0**-11  # of a float16, relative: the most that rounding to it changes
_TINIEST = 2.0**-25  # the same below float16's normal numbers


@dataclass(frozen=True)
class Decoded:
    """The tokens of one page.

    Attributes
    ----------
    keys, values: ``[n, D]`` float32.
    key_bounds, value_bounds: ``[n, D]`` float32, how far a coded number may be from what was coded.
    """

    keys: np.ndarray
    values: np.ndarray
    key_bounds: np.ndarray
    value_bounds: np.ndarray


def capacity(bits: int, head_size: int, page_bytes: int) -> int:
    """C: as many tokens as fit, a multiple of 4. A token takes two codes a dimension and one scale and zero."""
    return (page_bytes - 16 - 4 * head_size) * 8 // (2 * head_size * bits + 32) // 4 * 4


def decode(page: np.ndarray, bits: int, head_size: int) -> Decoded:
    """The tokens in the bytes ``page``, ``[page_bytes]`` uint8."""
    count = int(page[:4].view(np.int32)[0])
    most = capacity(bits, head_size, len(page))
    assert 1 <= count <= most, f"a cold page says that it holds {count} tokens, of 1 to {most}"
    assert not page[4:16].any(), "a cold page's header goes on after the number of tokens"
    parts, at = [], 16
    for numbers in (head_size, head_size, most, most):
        parts.append(page[at : at + 2 * numbers].view(np.float16).astype(np.float32))
        at += 2 * numbers
    key_scale, key_zero, value_scale, value_zero = parts
    codes = []
    for rows, columns in ((head_size, most), (most, head_size)):
        size = rows * columns * bits // 8
        codes.append(_codes(page[at : at + size].reshape(rows, -1), bits))
        at += size
    keys, values = codes[0].T[:count], codes[1][:count]
    value_scale, value_zero = value_scale[:count, None], value_zero[:count, None]
    key_bounds = np.broadcast_to(_bound(key_scale, key_zero, bits), keys.shape)
    value_bounds = np.broadcast_to(_bound(value_scale, value_zero, bits), values.shape)
    return Decoded(key_zero + keys * key_scale, value_zero + values * value_scale, key_bounds, value_bounds)


def _codes(rows: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[r, n]`` float32 of rows of bytes ``[r, n * bits / 8]``."""
    parts = [rows >> np.uint8(shift) & np.uint8(2**bits - 1) for shift in range(0, 8, bits)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _bound(scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """How far a number may be from its coded one.

    With ``zero`` the smallest number and ``scale`` the range over the largest code, both rounded to float16: between
    ``zero`` and ``zero + largest code * scale`` the nearest code is half a step away at most. Below lies only what
    rounding cut off from the smallest number, above what it cut off from the scale, as often as there are steps.
    """
    below = np.maximum(np.abs(zero) * _HALF, _TINIEST)
    above = (2**bits - 1) * np.maximum(scale * _HALF, _TINIEST)
    return np.maximum(scale / 2, np.maximum(below, above)) + _NOISE * (1 + np.abs(zero))
