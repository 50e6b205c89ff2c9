# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Bytes over time: what the request would hold, what it holds in each tier, and in how many blocks."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.pictures.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    Canvas,
    plain,
    size,
    title,
)

_TIERS = {"hot": BLUE, "cold": SKY, "host": GREEN}
_OTHERS = PINK


def draw_bytes(canvas: Canvas, profile: Profile) -> None:
    """One column per engine step; a compaction runs at the start of its step."""
    axes = canvas.subplots()
    steps, block_bytes = profile.steps, profile.engine["block_bytes"]
    edges = np.arange(len(steps) + 1)

    def stairs(values: list[int]) -> list[int]:
        return [*values, values[-1]]

    floor = np.zeros(len(edges))
    for tier in steps[0]["tier_bytes"]:
        top = floor + stairs([step["tier_bytes"].get(tier, 0) for step in steps])
        colour = _TIERS.get(tier, _OTHERS)
        axes.fill_between(edges, floor, top, step="post", color=colour, linewidth=0, label=f"{tier} tier")
        floor = top
    logical = [step["logical_bytes"] for step in steps]
    held = [step["blocks"] * block_bytes for step in steps]
    axes.step(edges, stairs(held), where="post", color=INK, linewidth=1.2, label="blocks held")
    axes.step(
        edges, stairs(logical), where="post", color=VERMILION, linewidth=1.6, linestyle="--", label="without eviction"
    )
    prefill = sum(step["kind"] == "prefill" for step in steps)
    axes.axvspan(0, prefill, color=ORANGE, alpha=0.2, linewidth=0, zorder=0, label="prefill steps")
    highest = max(*logical, *held) * 1.05
    for compaction in profile.compactions:
        axes.axvline(compaction.facts["step"], color=INK, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)
    first = profile.compactions[0].facts
    dense = -(-steps[-1]["logical_tokens"] // profile.engine["block_tokens"]) * block_bytes
    freed = first["source_blocks"] - first["target_blocks"]
    mean = "" if profile.dealing == "equal" else " on average"
    axes.set(xlim=(0, len(steps)), ylim=(0, highest))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.set_xlabel("engine step", fontsize=9)
    axes.set_ylabel("KV cache of the request", fontsize=9)
    plain(axes)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=6, columnspacing=1.2)
    title(
        canvas,
        "Bytes by tier over time",
        f"first compaction: {first['resident_before']:,} to {first['keep']:,} tokens{mean}, {freed} of "
        f"{first['source_blocks']} blocks given back; at the end {size(held[-1])} held instead of {size(dense)}",
    )
