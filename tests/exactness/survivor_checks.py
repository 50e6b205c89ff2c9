# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What must hold of every compaction, whatever it chose: counts, protected tokens, pages."""

from __future__ import annotations

import itertools

import torch
from cold_bytes import capacity
from recorded_pages import RecordedPages
from scenario import BLOCK_SIZE, Compaction
from torch import Tensor

Survivors = list[list[Tensor]]
"""[layer][kv head], each ``[kept]`` int64: ascending indices into the entries of that pair in hot pages."""


def check_counts(event: Compaction, previous: Compaction | None) -> None:
    """The scheduler's arithmetic, in nominal tokens: what a table of that many blocks holds.

    Parameters
    ----------
    event: to check.
    previous: the request's compaction before it, if it had one since it (re)started.
    """
    where = name_of(event)
    kept, seen = (previous.keep, previous.logical_len) if previous else (0, 0)
    before = kept + event.logical_len - seen
    assert event.resident_before == before, f"{where}: {event.resident_before} resident tokens, expected {before}"
    assert event.evicted_before == event.logical_len - before, f"{where}: wrong evicted_before"
    assert event.evicted_after == event.logical_len - event.keep, f"{where}: wrong evicted_after"
    assert event.target_blocks == -(-event.keep // BLOCK_SIZE), f"{where}: {event.target_blocks} target blocks"
    if event.dealing == "equal":
        assert event.serial == 0, f"{where}: nothing was dealt, but its serial is {event.serial}"
        return
    assert event.keep == event.target_blocks * BLOCK_SIZE, f"{where}: {event.keep} tokens are not whole blocks"
    assert event.serial > (previous.serial if previous else 0), f"{where}: serial {event.serial} is not new"


def check_survivors(
    event: Compaction,
    survivors: Survivors,
    lengths: list[list[int]],
    ranks: int,
    pages: RecordedPages | None = None,
) -> None:
    """Every pair keeps entries it has, sinks and recent ones among them, and as many pages are used as were given.

    Parameters
    ----------
    event: to check.
    survivors: what the workers recorded.
    lengths: ``[layer][kv head]``, entries of each pair before the compaction.
    ranks: tensor-parallel ranks; each deals the pages of its own kv heads.
    pages: what was dealt; None if no page can be cold.
    """
    where = name_of(event)
    shape = [len(heads) for heads in survivors]
    assert shape == [len(heads) for heads in lengths], f"{where}: survivors of {shape} heads"
    sink = torch.arange(event.sink_tokens)
    for layer, heads in enumerate(survivors):
        for head, index in enumerate(heads):
            pair, n = f"{where}, layer {layer}, head {head}", lengths[layer][head]
            assert (index.diff() > 0).all(), f"{pair}: survivors are not ascending"
            assert len(index) >= event.sink_tokens + event.recent_tokens, f"{pair}: only {len(index)} survivors"
            assert index[0] >= 0, f"{pair}: negative index"
            assert index[-1] < n, f"{pair}: index past the {n} resident entries"
            assert (index[: event.sink_tokens] == sink).all(), f"{pair}: a sink was evicted"
            recent = torch.arange(n - event.recent_tokens, n)
            assert (index[len(index) - event.recent_tokens :] == recent).all(), f"{pair}: a recent token lost"
            if event.dealing == "equal":
                assert len(index) == event.keep, f"{pair}: {len(index)} survivors"
            else:
                assert len(index) > 0, f"{pair}: no page"
                assert len(index) % BLOCK_SIZE == 0, f"{pair}: {len(index)} survivors are not whole pages"
    if event.dealing == "equal":
        return
    used = [[len(index) // BLOCK_SIZE for index in heads] for heads in survivors]
    if pages is not None and pages.cold:
        both = zip(used, pages.cold, strict=True)
        used = [[hot + len(cold) for hot, cold in zip(*heads, strict=True)] for heads in both]
    per_rank = shape[0] // ranks
    for first in range(0, shape[0], per_rank):
        mine = [count for heads in used for count in heads[first : first + per_rank]]
        wanted = event.target_blocks * len(mine)
        assert sum(mine) == wanted, f"{where}: {sum(mine)} pages dealt from {wanted}, kv heads from {first} on"


def check_cold(event: Compaction, pages: RecordedPages, survivors: Survivors, lengths: list[list[int]]) -> None:
    """New cold pages hold some tokens, no more than they can, none twice, none that is protected or in a hot page.

    Parameters
    ----------
    event: to check.
    pages: what was dealt.
    survivors, lengths: as of `check_survivors`.
    """
    for layer, heads in enumerate(survivors):
        for head, index in enumerate(heads):
            pair, n = f"{name_of(event)}, layer {layer}, head {head}", lengths[layer][head]
            made = pages.made[layer][head]
            if not made:
                continue
            most = capacity(pages.bits, pages.head_size, pages.raw[layer][head].shape[1])
            for tokens in made:
                assert 0 < len(tokens) <= most, f"{pair}: {len(tokens)} tokens in a cold page, of 1 to {most}"
            every = torch.cat(made)
            assert len(every.unique()) == len(every), f"{pair}: a token is in cold pages twice"
            assert not torch.isin(every, index).any(), f"{pair}: a token is hot and cold"
            protected = (every < event.sink_tokens) | (every >= n - event.recent_tokens)
            assert not protected.any(), f"{pair}: a sink or recent token is cold, or one past the {n} resident entries"


def check_pages(event: Compaction, pages: RecordedPages, survivors: Survivors) -> None:
    """Every page of the blocks that a compaction was given is that of one pair, hot or cold.

    Parameters
    ----------
    event: to check.
    pages: what was dealt.
    survivors: as of `check_survivors`.
    """
    where, heads = name_of(event), len(pages.hot[0])
    for layer, head in itertools.product(range(len(survivors)), range(heads)):
        held, wanted = len(pages.hot[layer][head]) * BLOCK_SIZE, len(survivors[layer][head])
        assert held == wanted, f"{where}, layer {layer}, head {head}: hot pages for {held} tokens, not for {wanted}"
    per_rank = heads // len(pages.targets)
    for rank, targets in enumerate(pages.targets):
        own = slice(rank * per_rank, (rank + 1) * per_rank)
        dealt = [numbers for part in (pages.hot, pages.cold) for layer in part for numbers in layer[own]]
        assert len(targets) == event.target_blocks * per_rank * len(survivors), f"{where}: {len(targets)} pages given"
        assert torch.equal(torch.cat(dealt).sort().values, targets.sort().values), (
            f"{where}: a page of rank {rank} was dealt twice, or to nobody, or was not given to it"
        )


def name_of(event: Compaction) -> str:
    return f"compaction of {event.request} in step {event.step}"
