# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Heat maps over tokens: the utility of each layer."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.analysis import bin_tokens, bin_width, rank_in_head
from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.meaning import meaning_of
from deltamem_vllm.evaluation.profile.pictures.style import (
    MOST_BINS,
    Canvas,
    heat_map,
    layer_ticks,
    title,
    token_strip,
)

# Percentiles at the ends of the colours. On a logarithmic scale few tokens spread over many decades at the bottom; on
# a linear one the first tokens of a text stand far above all others.
_LOG_ENDS = (2.0, 100.0)
_LINEAR_ENDS = (1.0, 99.5)


def draw_utility(canvas: Canvas, profile: Profile, *, ranks: bool = True) -> None:
    """Utility at the first compaction, tokens x layers: highest of the heads, and below it the mean rank."""
    tokens = profile.codes.shape[2]
    width = bin_width(tokens, MOST_BINS)
    rows = 2 if ranks else 1
    grid = canvas.subplots(
        1 + rows, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [0.025 * rows] + [1] * rows}
    )[:, 0]
    highest = bin_tokens(profile.utility.max(1), width, "max")
    heat_map(canvas, grid[1], highest, tokens, width, "viridis", _norm(profile, highest), "utility, highest head")
    if ranks:
        mean_rank = bin_tokens(rank_in_head(profile.codes).mean(1), width, "mean")
        heat_map(canvas, grid[2], mean_rank, tokens, width, "cividis", Normalize(0, 1), "rank in its head, mean")
    for axes in grid[1:]:
        axes.set_yticks(layer_ticks(highest.shape[0]))
        axes.set_ylabel("layer", fontsize=9)
    grid[-1].set_xlabel("token of the prompt" + (f", {width} to a column" if width > 1 else ""), fontsize=9)
    token_strip(grid[0], list(grid[1:]), profile, tokens)
    meaning = meaning_of(profile.scorer)
    title(canvas, "Utility when the prompt was compacted", f"{profile.scorer}: {meaning.quantity}")


def _norm(profile: Profile, values: NDArray[np.float64]) -> Normalize:
    logarithmic = profile.scale["kind"] == "log"
    low, high = (float(end) for end in np.percentile(values, _LOG_ENDS if logarithmic else _LINEAR_ENDS))
    return LogNorm(low, high) if logarithmic and 0 < low < high else Normalize(low, high)
