# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The codes of a cold page, taken out of their bytes (`codec/cold_page.py` says how they are packed)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_codes(packed: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Rows of B bytes as rows of ``B * 8 / BITS`` codes.

    Parameters
    ----------
    packed: ``[R, B]`` uint8.
    BITS: 8, 4 or 2.

    Returns
    -------
    ``[R, B * 8 // BITS]`` uint8: all first parts of the bytes, then all second parts, and so on.
    """
    if BITS == 8:
        return packed
    elif BITS == 4:
        both = tl.join(packed & 15, packed >> 4)
        return tl.reshape(tl.permute(both, (0, 2, 1)), (packed.shape[0], packed.shape[1] * 2))
    else:
        tl.static_assert(BITS == 2)
        four = tl.join(tl.join(packed & 3, (packed >> 2) & 3), tl.join((packed >> 4) & 3, packed >> 6))
        return tl.reshape(tl.permute(four, (0, 3, 2, 1)), (packed.shape[0], packed.shape[1] * 4))


@triton.jit
def unpack_codes(packed: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """`split_codes` minus half their range, int8.

    Centred codes are half as large, so that products with them lose half as much when they are rounded, and they are
    signed bytes, which GPUs turn into bfloat16 quickly. The zero of a row has to be moved by as much:
    `zero + 2 ** (BITS - 1) * scale`.
    """
    if BITS == 8:
        return (packed ^ 128).to(tl.int8, bitcast=True)
    else:
        return split_codes(packed, BITS).to(tl.int8) - 2 ** (BITS - 1)
