# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Where everything stands in a cold page: a page of the pool, read as bytes, with more tokens in fewer bits.

A cold page is self-contained: codes, scales and the number of its tokens are inside, so it may be moved and read
without anything else. Keys are coded per channel (a few channels of a key are always large), values per token: KIVI,
arXiv 2402.02750, and measured again by `deltamem codec`.

    bytes                  what
    16                     header: int32 count of tokens, then zeros
    2 * D, 2 * D           float16 scale and zero of each key channel
    2 * C, 2 * C           float16 scale and zero of each value (one a token)
    D * C * bits / 8       key codes, ``[D, C]``: channel by channel
    C * D * bits / 8       value codes, ``[C, D]``: token by token

Several codes share a byte, the part of the row they come from deciding their place in it: with 4 bits, byte i of a row
of n codes holds code i in its low half and code i + n / 2 in its high half; with 2 bits, code i + j * n / 4 in bits
2 * j and 2 * j + 1. So a vector of bytes becomes vectors of neighbouring codes with a shift and a mask.

An element is ``zero + code * scale``, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HEADER_BYTES: Final = 16
BITS: Final = (8, 4, 2)
"""Bits an element that a cold page can have."""

LOSS: Final = {8: 0.005, 4: 0.09, 2: 0.6}
"""Share of its worth that a token is taken to lose with that many bits an element: how far the attention output moves
when all entries but the sinks are coded (`deltamem codec smollm2`)."""

_TOKEN_STEP = 4  # rows of codes are split in up to four equal parts
_PARAMETER_BYTES = 2  # float16


@dataclass(frozen=True)
class ColdFormat:
    """The layout of cold pages of one model.

    Parameters
    ----------
    bits: of an element, one of `BITS`.
    head_size: D, a multiple of 4.
    page_bytes: of a page of the pool: ``block_size * 2 * D * itemsize``.

    Raises
    ------
    ValueError: none of the above, or a page holds no more tokens than it would uncoded.
    """

    bits: int
    head_size: int
    page_bytes: int

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"a cold page has {', '.join(map(str, BITS))} bits an element, got {self.bits}")
        if self.head_size < _TOKEN_STEP or self.head_size % _TOKEN_STEP:
            raise ValueError(f"heads of cold pages need a multiple of {_TOKEN_STEP} dimensions, got {self.head_size}")
        if self.capacity < 1:
            raise ValueError(
                f"a page of {self.page_bytes} bytes holds no cold token of {self.head_size} dimensions: scales take "
                f"{self._fixed_bytes} bytes; use larger blocks"
            )

    @property
    def capacity(self) -> int:
        """C, the most tokens of a page: as many as fit, a multiple of 4."""
        per_token = 2 * _PARAMETER_BYTES + 2 * self.head_size * self.bits // 8
        return max(0, (self.page_bytes - self._fixed_bytes) // per_token // _TOKEN_STEP * _TOKEN_STEP)

    @property
    def effective_bits(self) -> float:
        """Bits of the page for each element of a key or value in it: codes, scales, header and what is left over."""
        return self.page_bytes * 8 / (self.capacity * 2 * self.head_size)

    @property
    def key_scale(self) -> int:
        """Offset in bytes of the scales of the key channels; the zeros follow them."""
        return HEADER_BYTES

    @property
    def key_zero(self) -> int:
        """Offset in bytes of the zeros of the key channels."""
        return self.key_scale + _PARAMETER_BYTES * self.head_size

    @property
    def value_scale(self) -> int:
        """Offset in bytes of the scales of the values."""
        return self.key_zero + _PARAMETER_BYTES * self.head_size

    @property
    def value_zero(self) -> int:
        """Offset in bytes of the zeros of the values."""
        return self.value_scale + _PARAMETER_BYTES * self.capacity

    @property
    def key_codes(self) -> int:
        """Offset in bytes of the key codes."""
        return self.value_zero + _PARAMETER_BYTES * self.capacity

    @property
    def key_row_bytes(self) -> int:
        """Bytes of the codes of one key channel."""
        return self.capacity * self.bits // 8

    @property
    def value_codes(self) -> int:
        """Offset in bytes of the value codes."""
        return self.key_codes + self.head_size * self.key_row_bytes

    @property
    def value_row_bytes(self) -> int:
        """Bytes of the codes of one value."""
        return self.head_size * self.bits // 8

    @property
    def _fixed_bytes(self) -> int:
        return HEADER_BYTES + 2 * _PARAMETER_BYTES * self.head_size
