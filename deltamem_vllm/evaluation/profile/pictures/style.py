# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Colours, sizes, maps over tokens and the strip that says where in the prompt one is.

Colours are those of Okabe and Ito, which people with any common colour blindness can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.document import Profile

Canvas = Figure | SubFigure

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, GREY, INK = "#56B4E9", "#CC79A7", "#9a9a9a", "#222222"
EXACT, CODED = BLUE, ORANGE
"""Of the tiers, in every picture."""
_MARKS = (VERMILION, PINK, ORANGE, SKY)

DPI = 125
WIDTH = 12.8
"""Inches: 1600 pixels."""
MOST_BINS = 1200
"""Columns of a heat map, about one pixel each."""
# Of the axis: a span of four tokens among thousands would be narrower than a pixel.
_NARROWEST = 1 / 300


def title(canvas: Canvas, text: str, note: str = "") -> None:
    """A bold title on the left and, in a second line, what else must be known."""
    # mathtext sets the bold part: a title has one weight.
    words = r"\ ".join(text.split(" "))
    canvas.suptitle(rf"$\bf{{{words}}}$" + (f"\n{note}" if note else ""), x=0.01, ha="left", fontsize=10)


def pale(colour: str) -> tuple[float, float, float]:
    """A third of a colour on white, opaque: what lies behind it does not shine through."""
    red, green, blue = (1 - 0.35 * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def plain(axes: Axes) -> None:
    """Take away the frame's upper and right side."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def layer_ticks(layers: int) -> list[int]:
    """Layers to label: about ten, evenly spaced from 0."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, layers) if layers / s <= 11)
    return list(range(0, layers, step))


def token_strip(strip: Axes, below: Sequence[Axes], profile: Profile, tokens: int) -> None:
    """Fill `strip` with what the tokens are and point to the marked passages at the edges of the axes `below`.

    Parameters
    ----------
    tokens
        Length of the token axis; the prompt, and output behind it if it is longer.
    """
    facts, prompt = profile.compactions[0].facts, int(profile.prompt["tokens"])
    spans = [("sinks", 0, facts["sink_tokens"], GREEN)]
    spans += [(m["name"], m["start"], m["stop"], _MARKS[i % len(_MARKS)]) for i, m in enumerate(profile.marks)]
    spans.append(("recent", prompt - facts["recent_tokens"], prompt, BLUE))
    if tokens > prompt:
        spans.append(("output", prompt, tokens, GREY))
    strip.set(xlim=(0, tokens), ylim=(0, 1))
    strip.set_axis_off()
    strip.axhspan(0, 1, color="#ececec")
    for _, start, stop, colour in spans:
        width = max(stop - start, tokens * _NARROWEST)
        middle = min(max((start + stop) / 2, width / 2), tokens - width / 2)
        strip.axvspan(middle - width / 2, middle + width / 2, color=colour, linewidth=0)
    for i, mark in enumerate(profile.marks):
        for axes in below:
            # Not through the map: a line is wider than a short passage and would hide it.
            for height, pointer in ((1.0, 7), (0.0, 6)):
                axes.plot(
                    (mark["start"] + mark["stop"]) / 2,
                    height,
                    marker=pointer,
                    color=_MARKS[i % len(_MARKS)],
                    markersize=5,
                    transform=axes.get_xaxis_transform(),
                    clip_on=False,
                )
    strip.legend(
        handles=[Patch(color=colour, label=name) for name, _, _, colour in spans],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.4),
        ncols=len(spans),
        fontsize=8,
        frameon=False,
        handlelength=1.0,
        columnspacing=1.2,
        borderaxespad=0,
    )


def heat_map(
    canvas: Canvas,
    axes: Axes,
    values: NDArray[Any],
    tokens: int,
    width: int,
    colours: str,
    norm: Normalize,
    label: str,
) -> None:
    """Draw `values` [rows, columns] over tokens, `width` of them to a column, with a bar that explains the colours."""
    rows, columns = values.shape
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        norm=norm,
        # The last column may stand for fewer tokens; the axis ends where they do.
        extent=(0, columns * width, rows - 0.5, -0.5),
    )
    axes.set_xlim(0, tokens)
    axes.tick_params(labelsize=8)
    bar = canvas.colorbar(image, ax=axes, pad=0.01, fraction=0.03, aspect=30)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def size(count: float) -> str:
    """Bytes in words, in decimal units as vLLM and disks count them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
