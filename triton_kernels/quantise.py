# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Scale, zero and codes of a cold page's elements, rounded as `codec/cold_codec.py` rounds them.

Bytes come out equal only if every operation is rounded as IEEE says: kernels that use this are compiled with
``enable_fp_fusion=False``, and what is fused is written as `tl.fma`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def range_of(low: tl.tensor, high: tl.tensor, some: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Scale and zero, float16, of rows with these least and largest elements (float32); (0, 0) where not `some`.

    Both are cut to what float16 holds. Adding 0.0: which zero a reduction finds first would decide the sign of -0.0.
    """
    largest: tl.constexpr = 65504.0
    zero = tl.minimum(tl.maximum(tl.where(some, low, 0.0) + 0.0, -largest), largest).to(tl.float16)
    reach = tl.maximum(tl.where(some, high - zero.to(tl.float32), 0.0), 0.0) + 0.0
    steps = tl.full(reach.shape, 2**BITS - 1, tl.float32)
    return tl.minimum(tl.div_rn(reach, steps), largest).to(tl.float16), zero


@triton.jit
def divisor_of(scale: tl.tensor) -> tl.tensor:
    """What `codes_of` divides by for these scales (float16): the step, 1 for a scale of 0, and one divided by it."""
    step = tl.where(scale > 0, scale.to(tl.float32), 1.0)
    return step, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)


@triton.jit
def codes_of(
    tile: tl.tensor, scale: tl.tensor, zero: tl.tensor, step: tl.tensor, inverse: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """Codes (uint8) of a tile of elements (float32); 0 for minus infinity, NaN and where the scale is 0.

    A division takes a dozen instructions of a GPU, and each part of it that is not an addition or multiplication waits
    for a unit that few threads share. So one division by the step serves all that share it: product, remainder and
    correction give the quotient as IEEE rounds it (P. W. Markstein, Computation of elementary functions on the IBM RISC
    System/6000 processor, 1990). The remainder is exact, for a step has 11 bits. Elements are cut to the range first:
    nothing overflows, a scale of 0 makes all codes 0, and no code has to be cut.

    Ties go to the even code: adding 1.5 * 2 ** 23 leaves no bits for a fraction, the sum is rounded so, and its lowest
    bits are the code.
    """
    magic: tl.constexpr = 12582912.0
    above = tl.minimum(tl.maximum(tile - zero.to(tl.float32), 0.0), scale.to(tl.float32) * (2**BITS - 1.0))
    code = above * inverse
    code = tl.fma(tl.fma(-code, step, above), inverse, code)
    return (code + magic).to(tl.uint32, bitcast=True).to(tl.uint8)
