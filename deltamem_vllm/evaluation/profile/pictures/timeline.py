# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Bytes over time: what the request would hold, what it holds in each tier, and in how many blocks."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.pictures.style import (
    CODED,
    EXACT,
    GREY,
    INK,
    VERMILION,
    Canvas,
    plain,
    size,
    title,
)

# From the bottom upwards.
_TIERS = {"hot": (EXACT, "hot pages (exact)"), "cold": (CODED, "cold pages (coded)")}


def draw_bytes(canvas: Canvas, profile: Profile) -> None:
    """One column per engine step; a compaction runs at the start of its step."""
    axes = canvas.subplots()
    steps, block_bytes = profile.steps, profile.engine["block_bytes"]
    edges = np.arange(len(steps) + 1)

    def stairs(values: list[int]) -> list[int]:
        return [*values, values[-1]]

    floor = np.zeros(len(edges))
    for tier in sorted(steps[0]["tier_bytes"], key=list(_TIERS).index):
        held_bytes = stairs([step["tier_bytes"][tier] for step in steps])
        if any(held_bytes) or profile.tiered:
            colour, label = _TIERS[tier]
            axes.fill_between(edges, floor, floor + held_bytes, step="post", color=colour, linewidth=0, label=label)
        floor = floor + held_bytes
    logical = [step["logical_bytes"] for step in steps]
    held = [step["blocks"] * block_bytes for step in steps]
    axes.step(edges, stairs(held), where="post", color=INK, linewidth=1.2, label="blocks held")
    axes.step(
        edges, stairs(logical), where="post", color=VERMILION, linewidth=1.6, linestyle="--", label="without eviction"
    )
    prefill = sum(step["kind"] == "prefill" for step in steps)
    axes.axvspan(0, prefill, color=GREY, alpha=0.2, linewidth=0, zorder=0, label="prefill steps")
    highest = max(*logical, *held) * 1.05
    for compaction in profile.compactions:
        axes.axvline(compaction.facts["step"], color=INK, linewidth=0.7, linestyle=(0, (1, 2)), zorder=0)
    first = profile.compactions[0].facts
    dense = -(-steps[-1]["logical_tokens"] // profile.engine["block_tokens"]) * block_bytes
    freed = first["source_blocks"] - first["target_blocks"]
    kept = f"{first['keep']:,} tokens{'' if profile.dealing == 'equal' else ' on average'}"
    if profile.tiered:
        exact, coded = (float(counts.mean()) for counts in (profile.held[0].exact.counts, profile.held[0].coded.counts))
        kept = f"{exact:,.0f} exact + {coded:,.0f} coded (mean)"
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
        f"compaction 1: {first['resident_before']:,} tokens to {kept}, {freed} of "
        f"{first['source_blocks']} blocks given back; at the end {size(held[-1])}, not {size(dense)}",
    )
