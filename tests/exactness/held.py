# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What every (layer, kv head) of one request still holds after each of its compactions, and in what form."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cold_bytes import decode
from recorded_pages import RecordedPages
from scenario import Compaction, Result
from survivor_checks import Survivors, check_cold, check_counts, check_survivors, name_of
from torch import Tensor

NEVER = 1 << 62


@dataclass
class Coded:
    """The tokens of one layer that were coded.

    Attributes
    ----------
    since: ``[H_kv, N]`` int64, the first query that reads a token as it was coded.
    keys, values: ``[H_kv, N, D]`` float32, what it reads then.
    key_bounds, value_bounds: ``[H_kv, N, D]``, how far that may be from the exact ones.
    """

    since: Tensor
    keys: Tensor
    values: Tensor
    key_bounds: Tensor
    value_bounds: Tensor

    @classmethod
    def nothing(cls, heads: int, tokens: int, head_size: int) -> Coded:
        """No token is coded."""
        shape = (heads, tokens, head_size)
        return cls(torch.full((heads, tokens), NEVER), *(torch.zeros(shape) for _ in range(4)))

    def check(self, keys: Tensor, values: Tensor) -> None:
        """Every coded token stands for the exact ``keys`` and ``values``, ``[H_kv, N, D]``, as well as it can.

        Raises
        ------
        AssertionError: one does not.
        """
        there = (self.since < NEVER).unsqueeze(2)
        for name, coded, exact, bounds in (
            ("key", self.keys, keys, self.key_bounds),
            ("value", self.values, values, self.value_bounds),
        ):
            error = (coded - exact).abs()
            wrong = (there & (error > bounds)).nonzero()
            if len(wrong):
                head, token, channel = at = tuple(wrong[0].tolist())
                raise AssertionError(
                    f"{len(wrong)} numbers of coded {name}s are further away than coding explains, the first of head "
                    f"{head}, token {token}, channel {channel}: {coded[at]} for {exact[at]}, bound {bounds[at]}"
                )

    def move_one(self) -> None:
        """Give one token what stands for its neighbour among the coded ones: of the head with the fewest, the last.

        One that has fewer leans on each of them more, so that a single wrong one shows.
        """
        rows = [row.nonzero().squeeze(1) for row in self.since < NEVER]
        count, head = min(((len(row), head) for head, row in enumerate(rows) if len(row) > 1), default=(0, 0))
        if count:
            before, last = rows[head][-2:].tolist()
            self.keys[head, last], self.values[head, last] = self.keys[head, before], self.values[head, before]


@dataclass(frozen=True)
class View:
    """What a request's queries read.

    Attributes
    ----------
    visible: of each layer ``[H_kv, N, N]`` bool by query and token.
    coded: of each layer; empty if nothing was coded.
    """

    visible: list[Tensor]
    coded: list[Coded]


@dataclass(frozen=True)
class _ColdPage:
    tokens: Tensor
    """Of the request."""
    raw: Tensor


def replay(shape: tuple[int, int], n: int, result: Result, events: Sequence[Compaction], shift: bool = False) -> View:
    """Follow one epoch of a request through its compactions, checking each.

    Parameters
    ----------
    shape: layers and kv heads.
    n: tokens of the request that the reference computes.
    result: of the run.
    events: the compactions, in order.
    shift: replace one survivor of each by its neighbour.
    """
    layers, heads = shape
    pairs = list(itertools.product(range(layers), range(heads)))
    visible = torch.ones(n, n, dtype=torch.bool).tril().repeat(layers, heads, 1, 1)
    coded: list[Coded] = []
    # Tokens of each pair in hot pages, by resident index. Pairs hold different numbers of them once pages were dealt.
    hot = {pair: torch.arange(0) for pair in pairs}
    cold: dict[tuple[int, int], list[_ColdPage]] = {pair: [] for pair in pairs}
    seen = 0
    previous: Compaction | None = None
    for event in events:
        tail = torch.arange(seen, event.logical_len)
        hot = {pair: torch.cat([tokens, tail]) for pair, tokens in hot.items()}
        seen = event.logical_len
        survivors: Survivors = torch.load(Path(result.directory, event.file))
        pages = RecordedPages.load(Path(result.directory, event.pages_file)) if event.pages_file else None
        lengths = [[len(hot[layer, head]) for head in range(heads)] for layer in range(layers)]
        check_counts(event, previous)
        check_survivors(event, survivors, lengths, result.ranks, pages)
        if pages is not None and pages.cold:
            check_cold(event, pages, survivors, lengths)
            coded = coded or [Coded.nothing(heads, n, pages.head_size) for _ in range(layers)]
            for layer, head in pairs:
                made = [hot[layer, head][index] for index in pages.made[layer][head]]
                cold[layer, head] = _after(event, pages, (layer, head), made, cold[layer, head])
                for page in cold[layer, head][: len(made)]:
                    _put(coded[layer], head, page, pages, n, since=seen)
        else:
            assert not any(cold.values()), f"{name_of(event)}: its cold pages are gone"
        if shift:
            survivors = shift_one(survivors, pages)
        hot = {(layer, head): tokens[survivors[layer][head]] for (layer, head), tokens in hot.items()}
        previous = event
        if seen >= n:
            continue
        # Tokens computed from now on see, of all earlier tokens, the survivors only.
        for (layer, head), tokens in hot.items():
            visible[layer, head, seen:, :seen] = False
            for held in (tokens, *(page.tokens for page in cold[layer, head])):
                visible[layer, head, seen:, held] = True
    return View(list(visible), coded)


def _after(
    event: Compaction, pages: RecordedPages, pair: tuple[int, int], made: list[Tensor], old: list[_ColdPage]
) -> list[_ColdPage]:
    """A pair's cold pages after a compaction: the new ones, then of the old ones those that stayed, byte for byte."""
    layer, head = pair
    at = f"{name_of(event)}, layer {layer}, head {head}"
    stay, raw = pages.stay[layer][head], pages.raw[layer][head]
    assert len(stay) >= len(old), f"{at}: {len(old)} cold pages, but a choice among {len(stay)}"
    assert not stay[len(old) :].any(), f"{at}: a cold page stayed that was not there"
    kept = [page for page, stays in zip(old, stay.tolist(), strict=False) if stays]
    assert len(raw) == len(made) + len(kept), f"{at}: {len(raw)} cold pages, not {len(made)} new and {len(kept)} old"
    for page, now in zip(kept, raw[len(made) :], strict=True):
        assert torch.equal(page.raw, now), f"{at}: a cold page that stayed is another now"
    return [*(_ColdPage(tokens, now) for tokens, now in zip(made, raw, strict=False)), *kept]


def _put(coded: Coded, head: int, page: _ColdPage, pages: RecordedPages, n: int, since: int) -> None:
    """Queries from ``since`` on read the page's tokens as they were coded."""
    decoded = decode(page.raw.numpy(), pages.bits, pages.head_size)
    assert len(decoded.keys) == len(page.tokens), (
        f"a cold page says that it holds {len(decoded.keys)} tokens, but {len(page.tokens)} were chosen for it"
    )
    own = page.tokens < n
    tokens = page.tokens[own]
    assert (coded.since[head, tokens] == NEVER).all(), "a token was coded twice"
    coded.since[head, tokens] = since
    for target, numbers in (
        (coded.keys, decoded.keys),
        (coded.values, decoded.values),
        (coded.key_bounds, decoded.key_bounds),
        (coded.value_bounds, decoded.value_bounds),
    ):
        target[head, tokens] = torch.from_numpy(numbers.copy())[own]


def shift_one(survivors: Survivors, pages: RecordedPages | None = None) -> Survivors:
    """Replace one survivor of the pair that kept the fewest by the entry next to it, which was evicted.

    One that has fewer entries leans on each of them more, so that a single wrong one shows.
    """
    rows = sorted(
        (len(index), layer, head) for layer, heads in enumerate(survivors) for head, index in enumerate(heads)
    )
    for _, layer, head in rows:
        row = survivors[layer][head].tolist()
        coded = pages.made[layer][head] if pages is not None and pages.cold else []
        kept = {*row, *(token for page in coded for token in page.tolist())}
        # From the newest on: attention of random weights rarely ignores a late entry altogether.
        for position in reversed(range(len(row))):
            if row[position] - 1 >= 0 and row[position] - 1 not in kept:
                shifted = [list(heads) for heads in survivors]
                shifted[layer][head] = survivors[layer][head].clone()
                shifted[layer][head][position] -= 1
                return shifted
    raise AssertionError("nothing was evicted, so no survivor can be shifted")
