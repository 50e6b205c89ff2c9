# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The judge itself, on compactions made by hand: what it masks, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import Reference
from scenario import BLOCK_SIZE, Compaction, Result
from survivor_checks import Survivors, check_counts, check_survivors
from tiny_models import build_tiny_model

SINK, RECENT = 4, 8
# Pages that each (layer, kv head) keeps of 150 tokens (2 blocks), then of 190 (2 blocks).
FIRST = [[1, 3], [2, 2], [1, 3]]
SECOND = [[2, 1], [3, 2], [1, 3]]
LENGTHS = [[150, 150]] * 3
DRAW = torch.Generator().manual_seed(0)


def keep(n: int, pages: int) -> torch.Tensor:
    middle = torch.randperm(n - SINK - RECENT, generator=DRAW)[: pages * BLOCK_SIZE - SINK - RECENT] + SINK
    return torch.cat([torch.arange(SINK), middle.sort().values, torch.arange(n - RECENT, n)])


ONCE: Survivors = [[keep(150, pages) for pages in heads] for heads in FIRST]
TWICE: Survivors = [
    [keep(before * BLOCK_SIZE + 40, pages) for before, pages in zip(*heads, strict=True)]
    for heads in zip(FIRST, SECOND, strict=True)
]
EVENT = Compaction(
    step=2,
    request="r",
    logical_len=150,
    resident_before=150,
    keep=64,
    evicted_before=0,
    evicted_after=86,
    sink_tokens=SINK,
    recent_tokens=RECENT,
    dealing="global",
    serial=1,
    target_blocks=2,
    reused_blocks=0,
    in_place=False,
    fewest=32,
    most=96,
    file="once.pt",
)
NEXT = dataclasses.replace(
    EVENT,
    step=50,
    logical_len=190,
    resident_before=104,
    evicted_before=86,
    evicted_after=126,
    serial=2,
    file="twice.pt",
)


def test_masks_show_what_each_pair_still_holds(tmp_path: Path) -> None:
    torch.save(ONCE, tmp_path / "once.pt")
    torch.save(TWICE, tmp_path / "twice.pt")
    reference = Reference(build_tiny_model("llama", tmp_path))
    result = Result([], [EVENT, NEXT], [], [], 60, 1, 0, 0, 0, str(tmp_path), "", 1, {}, {})
    view = reference.view(200, result, [EVENT, NEXT])
    for layer, visible in enumerate(view.visible):
        for head in range(reference.kv_heads):
            first = ONCE[layer][head].tolist()
            held = [*first, *range(150, 190)]
            second = [held[i] for i in TWICE[layer][head].tolist()]
            for query in range(140, 200):
                seen = {token for token in range(200) if visible[head, query, token]}
                expected = {*range(query + 1)}
                if query >= 190:
                    expected = {*second, *range(190, query + 1)}
                elif query >= 150:
                    expected = {*first, *range(150, query + 1)}
                assert seen == expected, (layer, head, query)


def test_what_was_made_by_hand_is_accepted() -> None:
    check_counts(EVENT, None)
    check_counts(NEXT, EVENT)
    check_survivors(EVENT, ONCE, LENGTHS, ranks=1)
    check_survivors(NEXT, TWICE, [[n * BLOCK_SIZE + 40 for n in heads] for heads in FIRST], ranks=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resident_before": 105}, "expected 104"),
        ({"evicted_before": 85}, "wrong evicted_before"),
        ({"evicted_after": 125}, "wrong evicted_after"),
        ({"keep": 63, "evicted_after": 127}, "not whole blocks"),
        ({"target_blocks": 3}, "3 target blocks"),
        ({"serial": 1}, "is not new"),
        ({"dealing": "equal"}, "nothing was dealt"),
    ],
)
def test_wrong_counts_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_counts(dataclasses.replace(NEXT, **changes), EVENT)


def changed(layer: int, head: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Survivors:
    copy = [list(heads) for heads in ONCE]
    copy[layer][head] = change(copy[layer][head].clone())
    return copy


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        (ONCE[:2], r"survivors of \[2, 2\] heads"),
        (changed(0, 0, lambda index: index[torch.arange(len(index)).roll(1)]), "not ascending"),
        (changed(0, 0, lambda index: keep(150, 2)), "13 pages dealt from 12"),
        (changed(2, 1, lambda index: torch.cat([index[:5], index[6:]])), "not whole pages"),
        (changed(1, 0, lambda index: torch.where(index == 3, keep(150, 3)[60], index).sort().values), "sink|ascending"),
        (changed(1, 1, lambda index: torch.where(index == 149, 150, index)), "past the 150"),
        (changed(1, 1, lambda index: index - 1), "negative"),
        (changed(0, 1, lambda index: index[:10]), "only 10 survivors"),
    ],
)
def test_wrong_survivors_are_refused(survivors: Survivors, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_survivors(EVENT, survivors, LENGTHS, ranks=1)


def test_each_rank_deals_its_own_pages() -> None:
    """Heads 0 keep 4 pages in all and heads 1 keep 8: as one rank that is right, as two it is not."""
    with pytest.raises(AssertionError, match="4 pages dealt from 6, kv heads from 0 on"):
        check_survivors(EVENT, ONCE, LENGTHS, ranks=2)
