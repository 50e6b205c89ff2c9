# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Delta-scores of what stands in hot pages, on a GPU: `scoring/delta.py` without copying the pages together."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.ops.layout import PageLayout
from deltamem_vllm.triton_kernels import settings
from deltamem_vllm.triton_kernels.checks import check_pool, check_table
from deltamem_vllm.triton_kernels.window_outputs import window_outputs
from deltamem_vllm.triton_kernels.window_scores import window_scores


def page_utility(
    queries: Tensor,
    pool: Tensor,
    hot: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Score every entry by how far the output moves without it, and sum the scores of each page.

    The score is that of `DeltaScorer`: the largest move that any query of the window and of the group makes. It never
    waits for the device. Numbers of no page and lengths that do not fit are cut to what fits.

    Parameters
    ----------
    queries: ``[S, G, w, D]`` in the pool's dtype, contiguous: a kv head's G query heads, the last w queries, oldest
        first. Query i sees the first ``seq_lens - w + i + 1`` tokens.
    pool: ``[num_pages, block_size * 2 * D]`` float32, float16 or bfloat16.
    hot: where a token stands in a page; slots and dims at fixed distances.
    block_table: ``[S, W]`` int32, pages in token order; entries past a sequence's tokens do not matter.
    seq_lens: ``[S]`` int32.
    scale: factor on q.k.
    splits: parts in which each sequence is read at the same time; None: as many as fill the device.

    Returns
    -------
    Scores, ``[S, W * block_size]`` float32, 0 where there is no token, and their sums by page, ``[S, W]`` float32.

    Raises
    ------
    ValueError: a shape, dtype or layout does not fit.
    """
    check_pool(pool, hot, settings.DTYPES)
    dim, step = hot.head_size, settings.HEAD_STEP
    if dim % step or not 0 < dim <= settings.MOST_DIM:
        raise ValueError(f"heads need a multiple of {step} dims up to {settings.MOST_DIM}, got {dim}")
    if queries.dim() != 4 or queries.shape[3] != dim or queries.dtype != pool.dtype or not queries.is_contiguous():
        raise ValueError(
            f"queries must be contiguous [S, G, w, {dim}] in {pool.dtype}, got {tuple(queries.shape)} {queries.dtype}"
        )
    sequences, group, window, _ = queries.shape
    check_table("block_table", block_table, sequences, 2)
    check_table("seq_lens", seq_lens, sequences, 1)
    width, rows, device = block_table.shape[1], group * window, pool.device
    scores = torch.zeros(sequences, width * hot.block_size, dtype=torch.float32, device=device)
    sums = torch.zeros(sequences, width, dtype=torch.float32, device=device)
    if not scores.numel() or not rows:
        return scores, sums

    tiling = settings.window_tiling(dim, pool.element_size(), rows)
    tiles = -(-rows // tiling.rows)
    if splits is None:
        most = settings.most_splits(width * hot.block_size, 0, tiling, 2 * sequences * rows * dim)
        splits = min(most, settings.wanted_splits(device, sequences * tiles))
    apart = (sequences, rows, splits)
    top_logit, rest_lse = (torch.empty(apart, dtype=torch.float32, device=device) for _ in range(2))
    top_index = torch.empty(apart, dtype=torch.int32, device=device)
    top_value, rest_output = (torch.empty(*apart, dim, dtype=torch.float32, device=device) for _ in range(2))
    shape = settings.page_constants(hot) | {"PAGE_STRIDE": pool.stride(0), "ROWS": tiling.rows}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "enable_fp_fusion": True}
    table = (block_table.stride(0), width)
    window_outputs[sequences, tiles, splits](
        queries, pool, block_table, seq_lens, top_logit, top_index, top_value, rest_lse, rest_output,
        scale, pool.shape[0], splits, rows, window, *table, **shape, TILE=tiling.tile, **options,
    )  # fmt: skip
    lse, outputs, index, moved = _merge(top_logit, top_index, top_value, rest_lse, rest_output)
    window_scores[sequences, width](
        queries, pool, block_table, seq_lens, lse, outputs, index, moved, scores, sums,
        scale, pool.shape[0], rows, window, *table, **shape, TILE=tiling.tile, **(options | {"num_stages": 1}),
    )  # fmt: skip
    return scores, sums


def _merge(
    top_logit: Tensor, top_index: Tensor, top_value: Tensor, rest_lse: Tensor, rest_output: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The splits of each row made one: log-sum-exp of all, output, heaviest token, and the move without that."""
    top, best = top_logit.max(-1, keepdim=True)
    index = top_index.gather(-1, best).squeeze(-1)
    value = top_value.gather(-2, best.unsqueeze(-1).expand(-1, -1, -1, top_value.shape[-1])).squeeze(-2)
    # The heaviest tokens of the other splits are among the others now.
    logs = torch.cat([rest_lse, top_logit.scatter(-1, best, float("-inf"))], -1)
    rest = logs.logsumexp(-1, keepdim=True)
    weights = torch.where(rest > float("-inf"), (logs - rest).exp(), 0.0)
    without = (weights.unsqueeze(-2) @ torch.cat([rest_output, top_value], -2)).squeeze(-2)
    # A row that sees nothing has -inf for both: it weighs nothing.
    nothing = top == float("-inf")
    top_weight = torch.where(nothing, 0.0, (top - rest).sigmoid())
    step = (value - without) * top_weight
    lse = torch.where(nothing, float("inf"), torch.logaddexp(top, rest)).squeeze(-1)
    return lse.contiguous(), without + step, index.contiguous(), torch.linalg.vector_norm(step, dim=-1)
