# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A profile in a few lines of text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from deltamem_vllm.evaluation.profile.comparison import Comparison, budget_words, cold_words, comparison_of
from deltamem_vllm.evaluation.profile.document import Mark, Profile
from deltamem_vllm.evaluation.profile.meaning import meaning_of

_NAMED_LAYERS = 5


@dataclass(frozen=True)
class MarkKept:
    """How much of a marked passage was there at the end.

    Parameters
    ----------
    name
        Of the mark.
    tokens
        Its length.
    whole, part
        Heads (of all layers) that hold all of it, or some but not all; exactly or coded.
    share
        Tokens held, over all heads.
    coded
        The part of it that is coded.
    """

    name: str
    tokens: int
    whole: int
    part: int
    share: float
    coded: float


def mark_kept(mark: Mark, exact: NDArray[np.bool_], coded: NDArray[np.bool_]) -> MarkKept:
    """Count a passage in the tokens held, each [L, H_kv, tokens]."""
    exactly, inside = (tokens[:, :, mark["start"] : mark["stop"]] for tokens in (exact, exact | coded))
    whole, share = int(inside.all(2).sum()), float(inside.mean())
    part = int(inside.any(2).sum()) - whole
    return MarkKept(mark["name"], mark["stop"] - mark["start"], whole, part, share, share - float(exactly.mean()))


def memory_kept(profile: Profile) -> dict[str, float]:
    """Resident bytes and held blocks right after the first compaction and at the end, as shares of no eviction."""
    found = {}
    for name, step in (("first", profile.steps[profile.compactions[0].facts["step"]]), ("end", profile.steps[-1])):
        dense_blocks = -(-step["logical_tokens"] // profile.engine["block_tokens"])
        found[f"{name}_bytes"] = sum(step["tier_bytes"].values()) / step["logical_bytes"]
        found[f"{name}_blocks"] = step["blocks"] / dense_blocks
    return found


def summary(profile: Profile) -> Table:
    """The table that `deltamem profile` prints."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _rows(profile):
        table.add_row(name, Text(text))
    return table


def _rows(profile: Profile) -> list[tuple[str, str]]:
    compared = comparison_of(profile)
    memory, first = memory_kept(profile), profile.compactions[0].facts
    count = len(profile.compactions)
    compactions = f"after {count} compaction{'s' if count > 1 else ''}"
    prompt = f"{profile.prompt['tokens']:,} tokens ({profile.prompt['source']}), {profile.conditions['model']}"
    policy = f"scorer {profile.scorer}, {budget_words(profile)}, dealing {profile.dealing}"
    counts = f"{first['resident_before']:,} to {first['keep']:,} tokens{' on average' if compared.done else ''}"
    if profile.tiered:
        counts = f"{first['resident_before']:,} tokens to the room of {first['keep']:,} on average"
    at_first = f"{memory['first_bytes']:.1%} of the bytes and {memory['first_blocks']:.1%} of the blocks"
    rows = [
        ("prompt", f"{prompt}, {policy}"),
        ("memory kept", f"{at_first} after the first compaction ({counts})"),
        ("", f"{memory['end_bytes']:.1%} and {memory['end_blocks']:.1%} at the end, {compactions}"),
    ]
    if profile.tiered:
        rows += _tier_rows(profile, compared)
    rows += _dealt_rows(profile, compared) if compared.done else _equal_rows(profile, compared)
    heads = compared.equal.tokens.size
    for kept in (mark_kept(mark, profile.exact_at_end, profile.coded_at_end) for mark in profile.marks):
        gone = heads - kept.whole - kept.part
        where = f"whole in {kept.whole} of {heads} heads, in part in {kept.part}, gone from {gone}"
        coded = f" ({kept.coded:.0%} coded)" if profile.tiered else ""
        rows.append(
            (f"{kept.name} ({kept.tokens} tokens)", f"{where}; {kept.share:.0%} of its entries{coded} at the end")
        )
    if "answered" in profile.prompt:
        verdict = "right" if profile.prompt["answered"] else "wrong"
        rows.append(("reply", f"{verdict}: {' '.join(profile.prompt['reply'].split())[:70]}"))
    return rows


def _tier_rows(profile: Profile, compared: Comparison) -> list[tuple[str, str]]:
    """What the first compaction kept exactly, what coded, what not; and the memory that either took."""
    entries = compared.tokens * compared.dealt.tokens.size
    held, coded = int(compared.dealt.tokens.sum()), int(compared.dealt.coded.sum())
    cold = profile.cold_pages(0).sum() / profile.pages(0).sum()
    shares = f"{(held - coded) / entries:.1%} of the entries exact, {coded / entries:.1%} coded"
    return [
        ("tiers", f"{shares} ({cold_words(profile)}), {1 - held / entries:.1%} gone after the first compaction"),
        ("", f"{cold:.0%} of the pages are cold"),
    ]


def _dealt_rows(profile: Profile, compared: Comparison) -> list[tuple[str, str]]:
    """What was dealt, beside equal shares."""
    pages, share = profile.pages(0), compared.dealt.tokens / compared.tokens
    coded = " exact or coded" if profile.tiered else ""
    of = -(-compared.tokens // int(profile.engine["block_tokens"]))
    given = f"{pages.min():,} / {np.median(pages):,g} / {pages.max():,} of {of:,} (lowest, median, highest)"
    shares = f"{share.min():.1%} / {np.median(share):.1%} / {share.max():.1%} of the tokens{coded}"
    rows = [("dealt by", compared.basis), ("pages of a head", f"{given}: {shares}")]
    rows += _masses(compared, "as dealt", "if shares were equal")
    if profile.tiered:
        # Where utilities are no amounts, only of attention.
        coded_utility = compared.dealt.utility_coded
        utility = "" if coded_utility is None else f", {coded_utility.mean():.1%} of the utility"
        rows.append(("on coded tokens", f"{compared.dealt.attention_coded.mean():.1%} of the attention{utility}, mean"))
    order, ratio = _by_ratio(compared)
    rows += [
        ("layers with more", _layers(order[:_NAMED_LAYERS], ratio, more=True)),
        ("layers with less", _layers(order[::-1][:_NAMED_LAYERS], ratio, more=False)),
    ]
    return rows


def _equal_rows(profile: Profile, compared: Comparison) -> list[tuple[str, str]]:
    """Equal shares, beside what one ranking would give."""
    meaning = meaning_of(profile.scorer)
    rows = _masses(compared, "with equal shares", f"if dealt {meaning.ranking.replace('_', ' ')} over all of them")
    order, ratio = _by_ratio(compared)
    rows += [
        ("would get more", _layers(order[:_NAMED_LAYERS], ratio, more=True)),
        ("would get less", _layers(order[::-1][:_NAMED_LAYERS], ratio, more=False)),
    ]
    if meaning.comparable != "yes":
        rows.append(("", f"utilities compare between heads: {meaning.comparable}. {meaning.why}"))
    return rows


def _masses(compared: Comparison, done: str, other: str) -> list[tuple[str, str]]:
    """Retained attention and utility of what was done, and of what it is compared with."""
    first, second = (compared.dealt, compared.equal) if compared.done else (compared.equal, compared.dealt)
    rows = [
        ("retained attention", f"{_spread(first.attention_mass)} over {first.tokens.size} heads {done}"),
        ("", f"{_spread(second.attention_mass)} {other}"),
    ]
    if first.utility_mass is not None and second.utility_mass is not None:
        rows.append(("retained utility", f"{_spread(first.utility_mass)} {done}"))
        rows.append(("", f"{_spread(second.utility_mass)} {other}"))
    return rows


def _by_ratio(compared: Comparison) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Layers, those with most memory first, and the memory of each over its equal share."""
    ratio: NDArray[np.float64] = compared.ratio.mean(1)
    return np.argsort(-ratio, kind="stable"), ratio


def _spread(mass: NDArray[np.float64]) -> str:
    ends = f"{mass.min():.1%} / {np.median(mass):.1%} / {mass.max():.1%} (lowest, median, highest)"
    return f"{ends}, mean {mass.mean():.1%},"


def _layers(layers: NDArray[np.intp], ratio: NDArray[np.float64], *, more: bool) -> str:
    named = layers[ratio[layers] > 1] if more else layers[ratio[layers] < 1]
    return ", ".join(f"{layer} ({ratio[layer]:.1f}x)" for layer in named) or "none"
