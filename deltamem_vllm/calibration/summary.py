# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The numbers of a card: who gets how much memory, and how far that can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deltamem_vllm.calibration.corpus import FAMILIES
from deltamem_vllm.calibration.metrics import mean_metrics
from deltamem_vllm.calibration.profile import KEEP_RATIOS, shares


def share_table(profile: Tensor) -> dict[str, Any]:
    """By keep ratio, the share of its entries that each layer and kv head of [layers, kv heads, quantiles] keeps."""
    table = {}
    for ratio in KEEP_RATIOS:
        share = shares(profile, ratio)
        table[f"{ratio:g}"] = {
            "layers": [round(x, 3) for x in share.mean(-1).tolist()],
            "heads": [[round(x, 3) for x in row] for row in share.tolist()],
        }
    return table


def metrics(
    profiles: Tensor, learned: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Of [texts, layers, kv heads, quantiles] and what was told of each text: JSON values."""
    quarter = shares(profiles.mean(0), 0.25)
    alone = [(shares(profile, 0.25) - quarter).abs().mean().item() for profile in profiles]
    found = [text["metrics"] for text in held_out]
    return {
        # Of the repeated tokens, those the model would have written itself: low means it did not look things up.
        **_mean_share(learned, "repeated", "repeat_accuracy"),
        **_mean_share(learned, "answered", "answer_accuracy"),
        "pairs": quarter.numel(),
        "pairs_below_a_tenth_at_0.25": int((quarter < 0.1).sum()),
        "pairs_above_nine_tenths_at_0.25": int((quarter > 0.9).sum()),
        # How far a pair's share at 0.25 by one text alone is from the one by all, on average.
        "difference_between_texts_at_0.25": round(sum(alone) / len(alone), 4),
        "predictor_held_out": mean_metrics(found),
        "predictor_held_out_by_family": {family_of(text["kind"]): text["metrics"] for text in held_out},
    }


def family_of(kind: str) -> str:
    """The family of a kind of text."""
    return next(family for family, kinds in FAMILIES.items() if kind in kinds)


def _mean_share(texts: Sequence[Mapping[str, Any]], entry: str, name: str) -> dict[str, float]:
    found = [text[entry] for text in texts if entry in text]
    return {name: round(sum(found) / len(found), 4)} if found else {}
