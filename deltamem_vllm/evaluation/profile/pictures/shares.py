# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The same memory in equal shares and dealt: what each layer and head holds of it, and what each keeps with that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.comparison import Comparison, comparison_of
from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.pictures.style import (
    BLUE,
    CODED,
    EXACT,
    GREY,
    INK,
    ORANGE,
    Canvas,
    layer_ticks,
    plain,
    title,
)

# Of the diverging scale, as powers of two: a quarter to four times the equal share.
_EXTREME = 2.0


@dataclass(frozen=True)
class _Mass:
    """What is kept of `what` [L, H_kv], in equal shares and dealt, and the part of the latter on coded tokens."""

    what: str
    equal: NDArray[np.float64]
    dealt: NDArray[np.float64]
    coded: NDArray[np.float64]


def draw_shares(canvas: Canvas, profile: Profile) -> None:
    """Memory per layer and per head, and the attention and utility kept under either way of dealing."""
    compared = comparison_of(profile)
    ratio = compared.ratio
    layers = ratio.shape[0]
    equal, dealt = compared.equal, compared.dealt
    masses = [_Mass("attention", equal.attention_mass, dealt.attention_mass, dealt.attention_coded)]
    if equal.utility_mass is not None and dealt.utility_mass is not None and dealt.utility_coded is not None:
        masses.append(_Mass("utility", equal.utility_mass, dealt.utility_mass, dealt.utility_coded))
    bars, heads, *points = canvas.subplots(
        1,
        2 + len(masses),
        sharey=True,
        gridspec_kw={
            "width_ratios": [1.1, 0.3 + 0.08 * ratio.shape[1]] + [1.3 if len(masses) == 1 else 0.9] * len(masses)
        },
    )
    (_tier_bars if profile.tiered else _layer_bars)(bars, compared)
    image = heads.imshow(
        np.log2(np.maximum(ratio, 2.0**-8)),
        aspect="auto",
        interpolation="nearest",
        cmap="PuOr_r",
        norm=Normalize(-_EXTREME, _EXTREME),
        extent=(-0.5, ratio.shape[1] - 0.5, layers - 0.5, -0.5),
    )
    heads.set_xlabel("kv head", fontsize=9)
    heads.set_xticks(layer_ticks(ratio.shape[1]))
    heads.tick_params(labelsize=8)
    heads.set_title("each head", fontsize=9)
    bar = canvas.colorbar(image, ax=heads, pad=0.03, fraction=0.12, aspect=40, extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4x", "1/2x", "1x", "2x", "4x"])
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    for axes, mass in zip(points, masses, strict=True):
        if profile.tiered:
            _tier_points(axes, mass)
        else:
            _mass_points(axes, mass, compared.done)
        _finish_points(axes, mass)
    points[0].legend(fontsize=8, frameon=True, framealpha=0.9, edgecolor="none", loc="best")
    bars.set_ylabel("layer", fontsize=9)
    bars.set_yticks(layer_ticks(layers))
    bars.set_ylim(layers - 0.5, -0.5)
    if compared.done:
        note = f"as dealt (dealing {profile.dealing}, by {compared.basis}), beside equal shares of the same bytes"
        note += ", all exact" if profile.tiered else ""
    else:
        note = f"if the same bytes were dealt by {compared.basis}; shares were equal"
    title(canvas, "Memory by layer and head", note)


def _layer_bars(axes: Axes, compared: Comparison) -> None:
    share = compared.dealt.tokens.mean(1) / compared.tokens
    equal = float(compared.equal.tokens.mean() / compared.tokens)
    colours = [ORANGE if value >= equal else BLUE for value in share]
    axes.barh(np.arange(len(share)), share - equal, left=equal, color=colours, height=0.75)
    axes.axvline(equal, color=INK, linewidth=1)
    axes.set_xlim(0, max(2.0 * equal, float(share.max()) * 1.05))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"tokens kept{'' if compared.done else ' if dealt'} (line: equal shares)", fontsize=9)
    axes.set_title("each layer", fontsize=9)
    plain(axes)


def _tier_bars(axes: Axes, compared: Comparison) -> None:
    """Memory of each layer by tier; the tokens in the cold part are several times as many."""
    memory = compared.dealt.memory.mean(1) / compared.tokens
    exact = (compared.dealt.tokens - compared.dealt.coded).mean(1) / compared.tokens
    equal = float(compared.equal.memory.mean() / compared.tokens)
    layers = np.arange(len(memory))
    axes.barh(layers, exact, color=EXACT, height=0.75, label="exact")
    axes.barh(layers, memory - exact, left=exact, color=CODED, height=0.75, label="coded")
    axes.axvline(equal, color=INK, linewidth=1)
    axes.set_xlim(0, max(1.5 * equal, float(memory.max()) * 1.05))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("memory, of that without eviction\n(line: equal shares)", fontsize=9)
    axes.set_title("each layer", fontsize=9)
    axes.legend(fontsize=8, frameon=True, framealpha=0.9, edgecolor="none", loc="best")
    plain(axes)


def _mass_points(axes: Axes, mass: _Mass, dealt_done: bool) -> None:
    """What was done is filled, what it is compared with is hollow."""
    for head, rows in enumerate(_rows_of_heads(mass)):
        axes.hlines(rows, mass.equal[:, head], mass.dealt[:, head], color=GREY, linewidth=0.6)
        for values, colour, done, label in (
            (mass.dealt, ORANGE, dealt_done, "dealt" if dealt_done else "if dealt"),
            (mass.equal, BLUE, not dealt_done, "if shares were equal" if dealt_done else "equal shares"),
        ):
            face = colour if done else "white"
            axes.plot(values[:, head], rows, "o", ms=3.2, mfc=face, mec=colour, label=label if head == 0 else None)


def _tier_points(axes: Axes, mass: _Mass) -> None:
    """What was dealt: its exact part, and from there what coded tokens add. Hollow: what it is compared with."""
    for head, rows in enumerate(_rows_of_heads(mass)):
        exact, held, equal = (values[:, head] for values in (mass.dealt - mass.coded, mass.dealt, mass.equal))
        axes.hlines(rows, exact, held, color=CODED, linewidth=1.3, label="" if head else "coded tokens add")
        axes.plot(exact, rows, "|", ms=4.5, mew=1.3, color=EXACT, label="" if head else "dealt, exact tokens")
        axes.plot(held, rows, "o", ms=3.2, color=INK, label="" if head else "dealt, all")
        axes.plot(equal, rows, "o", ms=3.2, mfc="white", mec=GREY, label="" if head else "if shares were equal")


def _rows_of_heads(mass: _Mass) -> list[NDArray[np.float64]]:
    """Where each head's points stand: side by side inside a layer's row, or they would hide one another."""
    layers, heads = mass.equal.shape
    return [np.arange(layers) + (head - (heads - 1) / 2) * 0.7 / heads for head in range(heads)]


def _finish_points(axes: Axes, mass: _Mass) -> None:
    for layer in range(1, mass.equal.shape[0], 2):
        axes.axhspan(layer - 0.5, layer + 0.5, color="#f3f3f3", zorder=0, linewidth=0)
    lowest = min(float(mass.equal.min()), float((mass.dealt - mass.coded).min()))
    axes.set_xlim(lowest - 0.03, 1.01)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    what = "window attention" if mass.what == "attention" else mass.what
    axes.set_xlabel(f"{what} on the tokens kept", fontsize=9)
    axes.set_title(f"retained {mass.what}, each head", fontsize=9)
    plain(axes)
