# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What each layer and head kept of the prompt and the output: exactly, coded, or not at all."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.patches import Patch
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.analysis import bin_tokens, bin_width
from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.pictures.style import (
    CODED,
    EXACT,
    MOST_BINS,
    Canvas,
    heat_map,
    layer_ticks,
    title,
    token_strip,
)


def draw_kept(canvas: Canvas, profile: Profile) -> None:
    """What was held after the last step: tokens x (layer, head)."""
    exact, coded = profile.exact_at_end, profile.coded_at_end
    layers, heads, tokens = exact.shape
    width = bin_width(tokens, MOST_BINS)
    strip, axes = canvas.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [0.025, 1]})
    share = bin_tokens(exact.reshape(layers * heads, tokens), width, "mean")
    if profile.tiered:
        shown = bin_tokens(coded.reshape(layers * heads, tokens), width, "mean")
        _tier_map(axes, share, shown, tokens, width)
        _tier_legend(axes, int(profile.engine["cold"]["bits"]))
    else:
        heat_map(canvas, axes, share, tokens, width, "Blues", Normalize(0, 1), "share kept")
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="#d0d0d0" if profile.tiered else "white", linewidth=0.5)
    ticks = layer_ticks(layers)
    axes.set_yticks([layer * heads + (heads - 1) / 2 for layer in ticks], [str(layer) for layer in ticks])
    axes.set_ylabel(f"layer, {heads} kv heads each" if heads > 1 else "layer", fontsize=9)
    axes.set_xlabel("token" + (f", {width} to a column" if width > 1 else ""), fontsize=9)
    token_strip(strip, [axes], profile, tokens)
    title(canvas, "What each layer and head kept", _note(profile, exact.sum(2), coded.sum(2), tokens))


def _tier_map(axes: Axes, exact: NDArray[np.float64], coded: NDArray[np.float64], tokens: int, width: int) -> None:
    """Colours mixed by the share of a column's tokens that are in each tier; white is gone."""
    rows, columns = exact.shape
    gone = 1 - exact - coded
    shares = ((exact, to_rgb(EXACT)), (coded, to_rgb(CODED)), (gone, (1.0, 1.0, 1.0)))
    mixed = sum(share[..., None] * np.array(colour) for share, colour in shares)
    axes.imshow(
        np.clip(mixed, 0, 1),
        aspect="auto",
        interpolation="nearest",
        # The last column may stand for fewer tokens; the axis ends where they do.
        extent=(0, columns * width, rows - 0.5, -0.5),
    )
    axes.set_xlim(0, tokens)
    axes.tick_params(labelsize=8)


def _tier_legend(axes: Axes, bits: int) -> None:
    handles = [Patch(color=EXACT, label="exact"), Patch(color=CODED, label=f"coded in {bits} bits")]
    handles.append(Patch(facecolor="white", edgecolor="#9a9a9a", linewidth=0.6, label="gone"))
    # Below the map at its right end, beside the label of the axis: above it is the legend of the strip.
    axes.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(1.0, 0.0),
        borderaxespad=2.4,
        ncols=3,
        fontsize=8,
        frameon=False,
        handlelength=1.0,
        columnspacing=1.2,
    )


def _note(profile: Profile, exact: NDArray[np.int64], coded: NDArray[np.int64], tokens: int) -> str:
    count = len(profile.compactions)
    after = f"at the end, after {count} compaction{'s' if count > 1 else ''}"
    if not profile.tiered:
        return f"{_range(exact)} of {tokens:,} tokens in each head {after}"
    return f"{_range(exact)} of {tokens:,} tokens exact and {_range(coded)} coded in each head {after}"


def _range(counts: NDArray[np.int64]) -> str:
    return f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
