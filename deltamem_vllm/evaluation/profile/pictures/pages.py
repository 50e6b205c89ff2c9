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
from deltamem_vllm.evaluation.profile.pictures.style import (
    BLUE,
    CODED,
    EXACT,
    INK,
    ORANGE,
    Canvas,
    layer_ticks,
    pale,
    plain,
    title,
)

# More cells than this are too narrow, or too low, for numbers.
_MOST_COLUMNS, _MOST_ROWS = 48, 16
# Width of all cells in points, over that of a digit in a font of one point.
_CELLS_POINTS = 1350.0


def draw_pages(canvas: Canvas, profile: Profile) -> None:
    """Kept share of each layer and head, and below it the pages: at the first compaction and, of several, the last."""
    shown = sorted({0, len(profile.compactions) - 1})
    pages = [profile.pages(number) for number in shown]
    cold = [profile.cold_pages(number) for number in shown]
    layers, heads = pages[0].shape
    # One shape for one compaction or two, or the cells of the same model would differ.
    axes = canvas.subplots(
        1 + len(shown), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [1.2] + [1] * len(shown)}
    )[:, 0]
    done = profile.dealt["done"]
    before = comparison_of(profile).tokens
    coded = done.coded / before if profile.tiered else None
    _shares(axes[0], done.tokens / before, coded, float(done.memory.mean() / before))
    norm = _norm(np.concatenate(pages))
    for number, counts, coded_pages, below in zip(shown, pages, cold, axes[1:], strict=True):
        image = _heat_map(below, counts, coded_pages if profile.tiered else None, norm)
        logical = profile.compactions[number].facts["logical_len"]
        what = "hot + cold pages" if profile.tiered else "pages"
        below.set_title(f"{what} after compaction {number + 1}, at {logical:,} tokens", fontsize=9)
        below.set_ylabel("kv head", fontsize=9)
        below.set_yticks(layer_ticks(heads))
    axes[-1].set_xticks(layer_ticks(layers))
    axes[-1].set_xlabel("layer", fontsize=9)
    bar = canvas.colorbar(image, ax=list(axes), pad=0.01, fraction=0.02, aspect=30)
    bar.set_label("pages" if profile.tiered else f"pages of {profile.block_tokens} tokens", fontsize=8)
    ends = np.geomspace(norm.vmin or 1, norm.vmax or 1, 5) if isinstance(norm, LogNorm) else [norm.vmin, norm.vmax]
    ticks = sorted({round(float(end)) for end in ends if end is not None})
    bar.set_ticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    title(canvas, "What each layer and head was given", _note(profile, pages[0], cold[0]))


def _note(profile: Profile, pages: NDArray[np.int64], cold: NDArray[np.int64]) -> str:
    blocks = profile.compactions[0].facts["target_blocks"]
    found = f"{pages.sum():,} pages in {blocks:,} blocks"
    if profile.dealing == "equal":
        return f"dealing equal: {found}, {pages[0, 0]:,} for each head"
    spread = f"{pages.min():,} to {pages.max():,} for a head"
    if profile.tiered:
        cold_page = profile.engine["cold"]["page_tokens"]
        sizes = f"hot ones of {profile.block_tokens} exact tokens, cold ones of up to {cold_page:,} coded"
        spread += f"; {sizes}; {cold.sum() / pages.sum():.0%} are cold"
    return f"dealing {profile.dealing}, by {comparison_of(profile).basis}: {found}, {spread}"


def _shares(axes: Axes, share: NDArray[np.float64], coded: NDArray[np.float64] | None, equal: float) -> None:
    """Share of its tokens that each layer and head holds, `coded` of it coded; `equal` if all held as much, exactly."""
    layers, heads = share.shape
    tiers = [(share, BLUE, "layer", "each kv head")]
    if coded is not None:
        exact = share - coded
        tiers = [(share, CODED, "layer: coded", "kv head: all"), (exact, EXACT, "layer: exact", "kv head: exact")]
    for values, colour, layer_label, head_label in tiers:
        # The lower bar, drawn later, hides what is behind it, in spite of its paleness.
        axes.bar(np.arange(layers), values.mean(1), width=0.8, color=pale(colour), label=layer_label)
        for head in range(heads):
            # Heads side by side, or their points would hide one another.
            columns = np.arange(layers) + (head - (heads - 1) / 2) * 0.7 / heads
            axes.plot(columns, values[:, head], "o", ms=2.5, color=colour, label=head_label if head == 0 else None)
    line = f"equal shares{'' if coded is None else ', all exact'}: {equal:.1%}"
    axes.axhline(equal, color=ORANGE if coded is None else INK, linewidth=1.2, label=line)
    axes.set_ylim(0, min(float(share.max()) * 1.15, 1.0 if coded is None else 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("tokens kept", fontsize=9)
    plain(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=5, borderaxespad=0)


def _norm(pages: NDArray[np.int64]) -> Normalize:
    low, high = float(pages.min()), float(pages.max())
    return LogNorm(low, high) if 0 < low < high else Normalize(0, max(high, 1.0))


def _heat_map(axes: Axes, pages: NDArray[np.int64], cold: NDArray[np.int64] | None, norm: Normalize) -> AxesImage:
    """All pages of each layer and head as colours; as numbers, too, where they fit: hot and cold ones apart."""
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
        words = [[_words(pages[layer, head], cold, (layer, head)) for head in range(heads)] for layer in range(layers)]
        points = min(7.0, _CELLS_POINTS / layers / max(len(word) for row in words for word in row))
        for layer, head in np.ndindex(layers, heads):
            colour = "white" if shade[layer, head] > 0.55 else INK
            axes.text(layer, head, words[layer][head], ha="center", va="center", fontsize=points, color=colour)
    return image


def _words(pages: np.int64, cold: NDArray[np.int64] | None, at: tuple[int, int]) -> str:
    return str(pages) if cold is None else f"{pages - cold[at]}+{cold[at]}"
