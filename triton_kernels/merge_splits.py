# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention over several splits of the pages, made one: each weighed by its log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_splits(
    partial: tl.tensor,
    partial_lse: tl.tensor,
    query_start_loc: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    num_sequences: tl.tensor,
    splits: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One query of one head; grid ``(T * G,)``.

    Parameters
    ----------
    partial: ``[T, G, splits, D]`` float32, anything where `partial_lse`, ``[T, G, splits]`` float32, is -inf.
    query_start_loc: ``[S + 1]`` int32: rows outside belong to nobody and are left alone.
    out, lse: ``[T, G, D]`` in the model's dtype, ``[T, G]`` float32; zeros and -inf where no split read anything.
    CHUNK: splits that are read together.
    """
    row = tl.program_id(0).to(tl.int64)
    query = row // G
    if query < tl.load(query_start_loc):
        return
    if query >= tl.load(query_start_loc + num_sequences):
        return
    dim = tl.arange(0, D_PADDED)
    chunk = tl.arange(0, CHUNK)
    top = float("-inf")
    for start in range(0, splits, CHUNK):
        logs = tl.load(partial_lse + row * splits + start + chunk, mask=start + chunk < splits, other=float("-inf"))
        top = tl.maximum(top, tl.max(logs, 0))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros((D_PADDED,), tl.float32)
    for start in range(0, splits, CHUNK):
        logs = tl.load(partial_lse + row * splits + start + chunk, mask=start + chunk < splits, other=float("-inf"))
        weights = tl.exp(logs - base)
        # Splits that read nothing wrote nothing: whatever stands there must not be touched, not even times 0.
        parts = tl.load(
            partial + ((row * splits + start + chunk) * D)[:, None] + dim[None, :],
            mask=(logs > float("-inf"))[:, None] & (dim < D)[None, :],
            other=0.0,
        )
        total += tl.sum(weights, 0)
        acc += tl.sum(parts * weights[:, None], 0)
    acc = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * D + dim, acc.to(out.dtype.element_ty), mask=dim < D)
    tl.store(lse + row, base + tl.log(total))
