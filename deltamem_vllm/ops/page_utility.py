# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""page_utility on CPU: scores of tokens where they stand, in hot pages, by the native library.

Nothing is copied together first: keys and values are read from their pages, and every (layer, kv head) is a sequence of
its own, so that threads share them. The formulas are those of ``deltamem_vllm/scoring``, in float32; sums are made in
another order than torch's, and exponentials are good to 3e-7. On a GPU it is ``triton_kernels/utility.py``.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from deltamem_vllm.ops import native
from deltamem_vllm.ops.gather import PoolStrides
from deltamem_vllm.ops.layout import PageLayout

MOST_DIM: Final = 256
KEY_VALUE_FEATURES: Final = ("predictor", "distinct", "keydiff")
"""Scores by keys and values alone; a name's place is its number in the library."""

# WindowCall and FeatureCall of csrc/cpu/page_utility_types.h, field by field: all have eight bytes.
_PAGES: Final = "P2qP2qP3q6qqPq3P"
_WINDOW: Final = struct.Struct("@" + _PAGES + "2P3qd")
_FEATURES: Final = struct.Struct("@" + _PAGES + "5P2q")


@dataclass(frozen=True)
class OlderTokens:
    """Tokens that stand before those in pages, such as those of cold pages once they are decoded.

    Attributes
    ----------
    keys, values: ``[m, D]`` in the pool's dtype, those of the first sequence first.
    counts: ``[S]`` int64, of each sequence; they sum up to m.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor


_DELTA, _MEAN, _POOLED = range(3)
_BAD_LENGTH, _BAD_PAGE, _NO_MEMORY = 1, 2, 3


def page_utility(
    queries: Tensor,
    pool: Tensor,
    hot: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    older: OlderTokens | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Score every entry by how far the output moves without it, and sum the scores of each page.

    The score is that of `DeltaScorer`: the largest move that any query of the window and of the group makes. A sequence
    with fewer tokens than the window has queries is rated by the last of these. Where a number that the window reads is
    not finite, all scores of its sequence are NaN.

    Parameters
    ----------
    queries: ``[S, G, w, D]`` in the pool's dtype, contiguous: a kv head's G query heads, the last w queries, oldest
        first. Query i sees the first ``seq_lens - w + i + 1`` tokens.
    pool: ``[num_pages, block_size * 2 * D]`` float32, float16 or bfloat16, elements of a page side by side.
    hot: where a token stands in a page.
    block_table: ``[S, W]`` int32, pages in token order; entries past a sequence's tokens are not read.
    seq_lens: ``[S]`` int32.
    scale: factor on q.k.
    older: tokens before these; every query sees them.

    Returns
    -------
    Scores, ``[S, W * block_size]`` float32, 0 where there is no token, and their sums by page, ``[S, W]`` float32. With
    older tokens, each sequence's scores begin with theirs, and there are as many columns more as any sequence has.
    None if the library cannot do it: another device or kind of number, heads of more than 256 dims, a layout without
    fixed distances, or no library.

    Raises
    ------
    ValueError: a shape, dtype, page number or length does not fit.
    MemoryError: no room for the scratch memory.
    """
    reading = _reading(pool, hot)
    if reading is None:
        return None
    library, strides = reading
    sums = torch.zeros(block_table.shape, dtype=torch.float32)
    scores = _by_window(library, _DELTA, queries, pool, strides, block_table, seq_lens, scale, older, sums)
    return scores, sums


def window_attention(
    queries: Tensor,
    pool: Tensor,
    hot: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    older: OlderTokens | None = None,
    pooled: bool = False,
) -> Tensor | None:
    """Score every entry by the attention that it gets from the window's queries, on average over these and the group.

    Parameters
    ----------
    queries, pool, hot, block_table, seq_lens, scale, older: as of `page_utility`.
    pooled: like `SnapKVScorer`: an entry counts as the best of the seven around it, and the window's own entries as the
        best of all.

    Returns
    -------
    Scores as of `page_utility`; None under the same conditions.

    Raises
    ------
    ValueError, MemoryError: as `page_utility`.
    """
    reading = _reading(pool, hot)
    if reading is None:
        return None
    library, strides = reading
    kind = _POOLED if pooled else _MEAN
    return _by_window(library, kind, queries, pool, strides, block_table, seq_lens, scale, older, None)


def feature_scores(
    kind: Literal["predictor", "distinct", "keydiff"],
    pool: Tensor,
    hot: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    older: OlderTokens | None = None,
    weights: Tensor | None = None,
    before: tuple[Tensor, Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Score every entry by its key and value and what is usual for its head, as the scorer of that name does.

    Parameters
    ----------
    kind: one of `KEY_VALUE_FEATURES`.
    pool, hot, block_table, seq_lens, older: as of `page_utility`.
    weights: ``[S, features]`` float32 of the predictor, in the order of `scoring.features`; None for the others.
    before: what the heads have seen before: sums of the keys' unit vectors and of the values, ``[S, D]`` float32, and
        how many entries they are of. None: nothing.

    Returns
    -------
    Scores as of `page_utility`, and the two sums over ``before`` and these entries, ``[S, D]`` float32 (those of values
    are zeros for ``keydiff``). None under the conditions of `page_utility`.

    Raises
    ------
    ValueError, MemoryError: as `page_utility`.
    """
    reading = _reading(pool, hot)
    if reading is None:
        return None
    library, strides = reading
    pages, scores, held = _pages(pool, strides, block_table, seq_lens, older)
    sequences, dim = block_table.shape[0], strides.dim
    if kind not in KEY_VALUE_FEATURES or (kind == "predictor") != (weights is not None):
        raise ValueError(
            f"the kind of score must be one of {', '.join(KEY_VALUE_FEATURES)}, the first with weights and the others "
            f"without, got {kind!r} {'without' if weights is None else 'with'} weights"
        )
    if weights is not None:
        weights = _floats("weights", weights, (sequences, 1 + dim + dim // 2 + dim + 4))
    seen = (0, 0, 0)
    kept: list[Tensor] = []
    if before is not None:
        kept = [_floats("what was seen before", part, (sequences, dim)) for part in before[:2]]
        seen = (kept[0].data_ptr(), kept[1].data_ptr(), before[2])
    directions, values = (torch.zeros(sequences, dim) for _ in range(2))
    call = _FEATURES.pack(
        *pages, 0 if weights is None else weights.data_ptr(), *seen[:2], directions.data_ptr(), values.data_ptr(),
        seen[2], KEY_VALUE_FEATURES.index(kind),
    )  # fmt: skip
    _run(library.deltamem_feature_scores, call, pool, *held)
    return scores, directions, values


def _by_window(
    library: ctypes.CDLL,
    kind: int,
    queries: Tensor,
    pool: Tensor,
    strides: PoolStrides,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    older: OlderTokens | None,
    sums: Tensor | None,
) -> Tensor:
    pages, scores, held = _pages(pool, strides, block_table, seq_lens, older)
    shape = (block_table.shape[0], strides.dim)
    if queries.dim() != 4 or (queries.shape[0], queries.shape[3]) != shape or not all(queries.shape[1:3]):
        raise ValueError(f"queries must be [{shape[0]}, G, w, {shape[1]}], got {tuple(queries.shape)}")
    if queries.dtype != pool.dtype or not queries.is_contiguous() or not queries.is_cpu:
        raise ValueError(f"queries must be contiguous {pool.dtype} on the CPU, as the pool is, got {queries.dtype}")
    call = _WINDOW.pack(
        *pages, queries.data_ptr(), 0 if sums is None else sums.data_ptr(), *queries.shape[1:3], kind, scale
    )
    _run(library.deltamem_page_utility, call, pool, *held)
    return scores


def _reading(pool: Tensor, hot: PageLayout) -> tuple[ctypes.CDLL, PoolStrides] | None:
    """The library, and where tokens stand; None where it cannot read the pool, or is missing."""
    if not pool.is_cpu or pool.dtype not in native.DTYPE_CODES or hot.head_size > MOST_DIM:
        return None
    strides, library = PoolStrides.of(pool, hot), native.library()
    return None if strides is None or library is None else (library, strides)


def _pages(
    pool: Tensor, strides: PoolStrides, block_table: Tensor, seq_lens: Tensor, older: OlderTokens | None
) -> tuple[tuple[int, ...], Tensor, tuple[Tensor, ...]]:
    """The fields of `SequencePages`, the scores that will be written, and what must live until then, tables first."""
    for name, table, dims in (("block_table", block_table, 2), ("seq_lens", seq_lens, 1)):
        if table.dtype != torch.int32 or table.dim() != dims or len(table) != len(seq_lens) or not table.is_cpu:
            raise ValueError(
                f"{name} must be int32 with {dims} dimension(s) and {len(seq_lens)} rows on the CPU, "
                f"got {table.dtype} {tuple(table.shape)} on {table.device}"
            )
    held: tuple[Tensor, ...] = (block_table.contiguous(), seq_lens.contiguous())
    sequences, width = block_table.shape
    columns, before = width * strides.slots, (0, 0, 0)
    if older is not None:
        _check_older(older, pool.dtype, sequences, strides.dim)
        starts = torch.zeros(sequences + 1, dtype=torch.int64)
        torch.cumsum(older.counts, 0, out=starts[1:])
        held += (starts, older.keys.contiguous(), older.values.contiguous())
        before = (held[2].data_ptr(), held[3].data_ptr(), held[4].data_ptr())
        columns += int(older.counts.max())
    scores = torch.empty(sequences, columns, dtype=torch.float32)
    fields = (
        pool.data_ptr(), pool.shape[0], strides.page * pool.element_size(), held[0].data_ptr(), width, width,
        held[1].data_ptr(), sequences, strides.dim, strides.slots, *strides.keys, *strides.values,
        native.DTYPE_CODES[pool.dtype], scores.data_ptr(), columns, *before,
    )  # fmt: skip
    return fields, scores, held


def _check_older(older: OlderTokens, dtype: torch.dtype, sequences: int, dim: int) -> None:
    counts = older.counts
    if tuple(counts.shape) != (sequences,) or counts.dtype != torch.int64 or not counts.is_cpu or not sequences:
        raise ValueError(
            f"counts of older tokens must be int64 {(sequences,)}, got {counts.dtype} {tuple(counts.shape)}"
        )
    if int(counts.min()) < 0:
        raise ValueError(f"a sequence has 0 or more older tokens, got {int(counts.min())}")
    shape = (int(counts.sum()), dim)
    for name, part in (("keys", older.keys), ("values", older.values)):
        if tuple(part.shape) != shape or part.dtype != dtype or not part.is_cpu:
            raise ValueError(f"{name} of older tokens must be {dtype} {shape}, got {part.dtype} {tuple(part.shape)}")


def _run(function: Callable[..., int], call: bytes, pool: Tensor, *held: Tensor) -> None:
    block_table, seq_lens = held[:2]
    where = ctypes.c_int64()
    fault = function(call, ctypes.byref(where))
    if fault == _NO_MEMORY:
        raise MemoryError("no memory to score tokens in; use fewer threads or compact shorter requests")
    if fault:
        what = "a length that does not fit its pages" if fault == _BAD_LENGTH else "a page outside the pool"
        raise ValueError(
            f"sequence {where.value} has {what}: {int(seq_lens[where.value])} tokens in a table of "
            f"{block_table.shape[1]} pages, a pool of {pool.shape[0]} pages"
        )


def _floats(name: str, numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(numbers.shape) != shape or numbers.dtype != torch.float32 or not numbers.is_cpu:
        raise ValueError(f"{name} must be float32 {shape} on the CPU, got {numbers.dtype} {tuple(numbers.shape)}")
    return numbers.contiguous()
