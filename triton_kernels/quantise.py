# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Scale, zero and codes of a cold page's elements, rounded as `codec/cold_codec.py` rounds them.

Bytes come out equal only if every operation is rounded as IEEE says: kernels that use this divide with ``div_rn`` and
are compiled with ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def range_of(low: tl.tensor, high: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Scale and zero, float16, of rows with these least and largest elements (float32); (0, 0) where least > largest.

    Both are cut to what float16 holds. Adding 0.0: which zero a reduction finds first would decide the sign of -0.0.
    """
    largest: tl.constexpr = 65504.0
    some = low <= high
    zero = tl.minimum(tl.maximum(tl.where(some, low, 0.0) + 0.0, -largest), largest).to(tl.float16)
    reach = tl.maximum(tl.where(some, high - zero.to(tl.float32), 0.0), 0.0) + 0.0
    steps = tl.full(reach.shape, 2**BITS - 1, tl.float32)
    return tl.minimum(tl.div_rn(reach, steps), largest).to(tl.float16), zero


@triton.jit
def codes_of(tile: tl.tensor, scale: tl.tensor, zero: tl.tensor, there: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Codes (uint8) of a tile of elements (float32); 0 where there is none or the scale is 0.

    Ties go to the even code: adding 1.5 * 2 ** 23 leaves no bits for a fraction, and the sum is rounded so.
    """
    magic: tl.constexpr = 12582912.0
    step = tl.where(scale > 0, scale.to(tl.float32), 1.0)
    step = tl.broadcast_to(step, tile.shape)
    code = tl.div_rn(tile - zero.to(tl.float32), step)
    code = tl.minimum(tl.maximum(code, 0.0), 2**BITS - 1.0)
    code = (code + magic) - magic
    return tl.where(there & (scale > 0), code, 0.0).to(tl.uint8)
