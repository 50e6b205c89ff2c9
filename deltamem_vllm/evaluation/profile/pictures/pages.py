# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What each layer and head was given: its pages as a heat map, and the share of its tokens that is."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.comparison import comparison_of
from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.pictures.style import BLUE, INK, ORANGE, Canvas, layer_ticks, plain, title

# More cells than this are too narrow, or too low, for numbers.
_MOST_COLUMNS, _MOST_ROWS = 48, 16


def draw_pages(canvas: Canvas, profile: Profile) -> None:
    """Kept share of each layer and head, and below it the pages: at the first compaction and, of several, the last."""
    shown = sorted({0, len(profile.compactions) - 1})
    pages = [profile.pages(number) for number in shown]
    layers, heads = pages[0].shape
    # One shape for one compaction or two, or the cells of the same model would differ.
    axes = canvas.subplots(
        1 + len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [1.2] + [1] * len(shown)}
    )[:, 0]
    done = profile.dealt["done"]
    before = comparison_of(profile).tokens
    _shares(axes[0], done.tokens / before, float(done.tokens.mean() / before))
    norm = _norm(np.concatenate(pages))
    for number, counts, below in zip(shown, pages, axes[1:], strict=True):
        image = _heat_map(below, counts, norm)
        logical = profile.compactions[number].facts["logical_len"]
        below.set_title(f"pages after compaction {number + 1}, at {logical:,} tokens", fontsize=9)
        below.set_ylabel("kv head", fontsize=9)
        below.set_yticks(layer_ticks(heads))
    axes[-1].set_xticks(layer_ticks(layers))
    axes[-1].set_xlabel("layer", fontsize=9)
    bar = canvas.colorbar(image, ax=list(axes), pad=0.01, fraction=0.02, aspect=30)
    bar.set_label(f"pages of {profile.engine['block_tokens']} tokens", fontsize=8)
    ends = np.geomspace(norm.vmin or 1, norm.vmax or 1, 5) if isinstance(norm, LogNorm) else [norm.vmin, norm.vmax]
    ticks = sorted({round(float(end)) for end in ends if end is not None})
    bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    title(canvas, "What each layer and head was given", _note(profile, pages[0]))


def _note(profile: Profile, pages: NDArray[np.int64]) -> str:
    blocks = profile.compactions[0].facts["target_blocks"]
    found = f"{pages.sum():,} pages in {blocks:,} blocks"
    if profile.dealing == "equal":
        return f"dealing equal: {found}, {pages[0, 0]:,} for each head"
    spread = f"{pages.min():,} to {pages.max():,} for a head"
    return f"dealing {profile.dealing}, by {comparison_of(profile).basis}: {found}, {spread}"


def _shares(axes: Axes, share: NDArray[np.float64], equal: float) -> None:
    layers, heads = share.shape
    axes.bar(np.arange(layers), share.mean(1), width=0.8, color=BLUE, alpha=0.35, label="layer")
    for head in range(heads):
        # Heads side by side, or their points would hide one another.
        columns = np.arange(layers) + (head - (heads - 1) / 2) * 0.7 / heads
        axes.plot(columns, share[:, head], "o", ms=2.5, color=BLUE, label="each kv head" if head == 0 else None)
    axes.axhline(equal, color=ORANGE, linewidth=1.2, label=f"equal shares: {equal:.1%}")
    axes.set_ylim(0, min(float(share.max()) * 1.15, 1.0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("tokens kept", fontsize=9)
    plain(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0)


def _norm(pages: NDArray[np.int64]) -> Normalize:
    low, high = float(pages.min()), float(pages.max())
    return LogNorm(low, high) if 0 < low < high else Normalize(0, max(high, 1.0))


def _heat_map(axes: Axes, pages: NDArray[np.int64], norm: Normalize) -> AxesImage:
    layers, heads = pages.shape
    image = axes.imshow(
        pages.T,
        aspect="auto",
        interpolation="nearest",
        cmap="YlGnBu",
        norm=norm,
        extent=(-0.5, layers - 0.5, heads - 0.5, -0.5),
    )
    axes.tick_params(labelsize=8)
    if layers <= _MOST_COLUMNS and heads <= _MOST_ROWS:
        shade: Any = norm(pages.astype(float))
        for layer, head in np.ndindex(layers, heads):
            colour = "white" if shade[layer, head] > 0.55 else INK
            axes.text(layer, head, str(pages[layer, head]), ha="center", va="center", fontsize=7, color=colour)
    return image
