# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The checks of cold pages themselves, on compactions made by hand: what they accept, and what they refuse."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from cold_bytes import capacity, decode
from held import NEVER, View, replay
from recorded_pages import RecordedPages
from scenario import BLOCK_SIZE, Compaction, Result
from survivor_checks import check_cold, check_pages, check_survivors

from deltamem_vllm.codec.cold_page import BITS, ColdFormat
from deltamem_vllm.ops.reference_cold import decode_page, encode_page

SINK, RECENT, DIM, PAGE_BYTES = 4, 8, 16, 1024
COLD = ColdFormat(4, DIM, PAGE_BYTES)
DRAW = torch.Generator().manual_seed(3)
HOT = torch.cat([torch.arange(20), torch.arange(138, 150)])
FIRST, SECOND = torch.arange(20, 60), torch.tensor([70, 131, 90])


def a_page(tokens: torch.Tensor) -> torch.Tensor:
    numbers = torch.randn(2, len(tokens), DIM, generator=DRAW)
    return torch.from_numpy(np.frombuffer(encode_page(COLD, *numbers, len(tokens)), dtype=np.uint8).copy())


# One layer, one head, 150 tokens: of three pages one is hot and two are cold.
PAGES = RecordedPages(
    bits=4,
    head_size=DIM,
    targets=[torch.tensor([5, 9, 7])],
    hot=[[torch.tensor([9])]],
    cold=[[torch.tensor([7, 5])]],
    made=[[[FIRST, SECOND]]],
    stay=[[torch.zeros(0, dtype=torch.bool)]],
    raw=[[torch.stack([a_page(FIRST), a_page(SECOND)])]],
)
EVENT = Compaction(
    step=2,
    request="r",
    logical_len=150,
    resident_before=150,
    keep=96,
    evicted_before=0,
    evicted_after=54,
    sink_tokens=SINK,
    recent_tokens=RECENT,
    dealing="global",
    serial=1,
    target_blocks=3,
    reused_blocks=0,
    in_place=False,
    fewest=32,
    most=32,
    file="first.pt",
    pages_file="first-pages.pt",
)
# 20 tokens later: the second cold page goes, the first stays behind a new one.
MADE = torch.tensor([5, 40])
NEXT = dataclasses.replace(
    EVENT,
    step=30,
    logical_len=170,
    resident_before=116,
    evicted_before=54,
    evicted_after=74,
    serial=2,
    file="next.pt",
    pages_file="next-pages.pt",
)
NEXT_HOT = torch.cat([torch.arange(5), torch.arange(6, 25), torch.arange(44, 52)])
NEXT_PAGES = dataclasses.replace(
    PAGES,
    targets=[torch.tensor([1, 2, 3])],
    hot=[[torch.tensor([1])]],
    cold=[[torch.tensor([2, 3])]],
    made=[[[MADE]]],
    stay=[[torch.tensor([True, False])]],
    raw=[[torch.stack([a_page(MADE), PAGES.raw[0][0][0]])]],
)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_read_as_the_formats_definition_reads_them(bits: int) -> None:
    layout = ColdFormat(bits, DIM, PAGE_BYTES)
    assert capacity(bits, DIM, PAGE_BYTES) == layout.capacity
    for count in (1, 7, layout.capacity):
        exact = torch.randn(2, count, DIM, generator=DRAW) * torch.logspace(-3, 2, DIM)
        page = encode_page(layout, *exact, count)
        decoded = decode(np.frombuffer(page, dtype=np.uint8), bits, DIM)
        keys, values, _ = decode_page(layout, page)
        assert np.array_equal(decoded.keys, keys[:count].numpy())
        assert np.array_equal(decoded.values, values[:count].numpy())
        assert (np.abs(decoded.keys - exact[0].numpy()) <= decoded.key_bounds).all()
        assert (np.abs(decoded.values - exact[1].numpy()) <= decoded.value_bounds).all()
        if count > 1:
            # Bounds are no looser than they must be: the tokens in another order are beyond them.
            assert (np.abs(decoded.keys - exact[0].roll(1, 0).numpy()) > decoded.key_bounds).any()


def follow(folder: Path, pages: RecordedPages = PAGES, after: RecordedPages = NEXT_PAGES) -> View:
    torch.save([[HOT]], folder / EVENT.file)
    torch.save([[NEXT_HOT]], folder / NEXT.file)
    pages.save(folder / EVENT.pages_file)
    after.save(folder / NEXT.pages_file)
    result = Result([], [EVENT, NEXT], [], [], 60, 1, 0, 0, 0, str(folder), "", 1, {}, {})
    return replay((1, 1), 180, result, [EVENT, NEXT])


def test_queries_read_hot_and_cold_tokens_that_are_left(tmp_path: Path) -> None:
    view = follow(tmp_path)
    tail = [*HOT.tolist(), *range(150, 170)]
    for query in range(140, 180):
        expected = {*range(query + 1)}
        if query >= 170:
            held = {tail[i] for i in NEXT_HOT.tolist()} | {tail[i] for i in MADE.tolist()} | {*FIRST.tolist()}
            expected = {*held, *range(170, query + 1)}
        elif query >= 150:
            expected = {*HOT.tolist(), *FIRST.tolist(), *SECOND.tolist(), *range(150, query + 1)}
        assert {*view.visible[0][0, query].nonzero().squeeze(1).tolist()} == expected, query
    since = view.coded[0].since[0]
    first = decode(PAGES.raw[0][0][0].numpy(), 4, DIM)
    assert (since[FIRST] == 150).all()
    assert np.array_equal(view.coded[0].keys[0, FIRST].numpy(), first.keys)
    assert np.array_equal(view.coded[0].values[0, FIRST].numpy(), first.values)
    assert {int(t) for t in (since == 170).nonzero()} == {tail[i] for i in MADE.tolist()}
    assert (since[HOT[tail[5] != HOT]] == NEVER).all()


def test_a_page_that_stayed_must_be_the_same_bytes(tmp_path: Path) -> None:
    raw = NEXT_PAGES.raw[0][0].clone()
    raw[1, -1] ^= 1
    with pytest.raises(AssertionError, match="another now"):
        follow(tmp_path, after=dataclasses.replace(NEXT_PAGES, raw=[[raw]]))


def test_a_page_must_say_how_many_tokens_were_chosen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="holds 40 tokens, but 39"):
        follow(tmp_path, dataclasses.replace(PAGES, made=[[[FIRST[1:], SECOND]]]))


def test_old_cold_pages_cannot_be_forgotten(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a choice among 0"):
        follow(tmp_path, after=dataclasses.replace(NEXT_PAGES, stay=PAGES.stay))
    with pytest.raises(AssertionError, match="cold pages are gone|pages dealt from"):
        follow(tmp_path, after=dataclasses.replace(NEXT_PAGES, cold=[], made=[], stay=[], raw=[]))


def test_what_was_made_by_hand_is_accepted() -> None:
    assert len(HOT) == len(NEXT_HOT) == BLOCK_SIZE
    check_survivors(EVENT, [[HOT]], [[150]], 1, PAGES)
    check_cold(EVENT, PAGES, [[HOT]], [[150]])
    check_pages(EVENT, PAGES, [[HOT]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cold": [[torch.tensor([7])]]}, "2 pages dealt from 3"),
        ({"cold": [[torch.tensor([7, 9])]]}, "dealt twice"),
        ({"cold": [[torch.tensor([7, 6])]]}, "not given to it"),
        ({"made": [[[FIRST, torch.tensor([70, 20])]]]}, "in cold pages twice"),
        ({"made": [[[FIRST, torch.tensor([70, 19])]]]}, "hot and cold"),
        ({"made": [[[FIRST, torch.tensor([70, 150])]]]}, "past the 150"),
        ({"made": [[[torch.arange(20, 20 + COLD.capacity + 1), SECOND]]]}, f"of 1 to {COLD.capacity}"),
        ({"made": [[[FIRST, torch.arange(0)]]]}, "0 tokens in a cold page"),
    ],
)
def test_wrong_pages_are_refused(changes: dict, message: str) -> None:
    pages = dataclasses.replace(PAGES, **changes)
    with pytest.raises(AssertionError, match=message):
        check_survivors(EVENT, [[HOT]], [[150]], 1, pages)
        check_cold(EVENT, pages, [[HOT]], [[150]])
        check_pages(EVENT, pages, [[HOT]])


def test_protected_tokens_may_not_be_cold() -> None:
    for token in (SINK - 1, 150 - RECENT):
        others = HOT[token != HOT]
        pages = dataclasses.replace(PAGES, made=[[[FIRST, torch.tensor([token])]]])
        with pytest.raises(AssertionError, match="a sink or recent token is cold"):
            check_cold(EVENT, pages, [[others]], [[150]])
