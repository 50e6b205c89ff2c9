# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Page tables are touched only where something changed; they must always equal tables built anew."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.dealing.cold_pages import ColdPages, by_pair
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.tables import PageTables

LAYERS, HEADS, SIZE, DIM, BLOCKS = 3, 2, 4, 8, 200


def make_pool(order: str = "LBH") -> PagePool:
    """A pool in one of the head-major orders of layers (L), blocks (B) and heads (H)."""
    extent = {"L": LAYERS, "B": BLOCKS, "H": HEADS}
    memory = torch.zeros(*(extent[axis] for axis in order), SIZE, 2 * DIM)
    by_layer = memory.permute(*(order.index(axis) for axis in "LBH"), 3, 4)
    return PagePool([by_layer[layer] for layer in range(LAYERS)])


class Slow:
    """The same bookkeeping without any state to go wrong: nested lists, made for every question."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.dealt: dict[str, tuple[int, list[list[list[int]]]]] = {}
        self.cold: dict[str, list[list[list[int]]]] = {}

    def page(self, block: int, layer: int, head: int) -> int:
        return int(self.pool.ids(torch.tensor([block]))[layer, head, 0])

    def row(self, request: str, blocks: list[int], layer: int, head: int) -> list[int]:
        first, pages = self.dealt.get(request, (0, None))
        own = pages[layer][head] if pages is not None else []
        return own + [self.page(block, layer, head) for block in blocks[first:]]

    def length(self, request: str, nominal: int, layer: int, head: int) -> int:
        first, pages = self.dealt.get(request, (0, None))
        return nominal + (len(pages[layer][head]) - first if pages is not None else 0) * SIZE


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), fixed=st.booleans(), coded=st.booleans())
def test_tables_equal_tables_built_anew(seed: int, fixed: bool, coded: bool) -> None:
    rng = random.Random(seed)
    pool = make_pool()
    tables, slow = PageTables(pool, max_rows=5, max_width=120, fixed=fixed, cold=coded), Slow(pool)
    free = list(range(BLOCKS))
    rng.shuffle(free)
    blocks: dict[str, list[int]] = {}
    serials: dict[str, int] = {}
    count = 0
    for _ in range(40):
        action = rng.choice(["start", "grow", "compact", "end", "restart", "shuffle"])
        names = sorted(blocks)
        if action == "start" and len(blocks) < 5 and len(free) > 8:
            blocks[f"r{count}"] = [free.pop() for _ in range(rng.randint(1, 6))]
            count += 1
        elif action == "grow" and names and free:
            blocks[rng.choice(names)].append(free.pop())
        elif action == "compact" and names:
            name = rng.choice(names)
            keep = rng.randint(1, len(blocks[name]))
            supply = [[len(slow.row(name, blocks[name], la, h)) for h in range(HEADS)] for la in range(LAYERS)]
            total = keep * LAYERS * HEADS
            held = sum(map(sum, supply))
            # Old cold pages stay or go, so there may be fewer hot ones than pages.
            total_cold = rng.randint(max(0, total - held), total - 1) if coded and rng.random() < 0.7 else 0
            total_cold = max(total_cold, total - held)
            counts = random_counts(rng, supply, total - total_cold)
            target = (
                blocks[name][:keep] if rng.random() < 0.5 or len(free) < keep else [free.pop() for _ in range(keep)]
            )
            free = [b for b in blocks[name] if b not in target] + free
            blocks[name] = list(target)
            count += 1
            serials[name] = count
            ids = pool.ids(torch.tensor(target)).flatten()
            ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
            hot, rest = ids.tensor_split([total - total_cold])
            cold, slow.cold[name] = None, split([], [[0] * HEADS] * LAYERS)
            if total_cold or rng.random() < 0.3:
                by_place = random_counts(rng, [[total_cold] * HEADS] * LAYERS, total_cold)
                numbers = by_pair(torch.tensor(by_place), rest)
                cold = ColdPages(torch.tensor(by_place), numbers, numbers.long() + 1, None)
                slow.cold[name] = split(rest.tolist(), by_place)
            tables.put(name, count, keep, torch.tensor(counts), hot, cold=cold)
            slow.dealt[name] = (keep, split(hot.tolist(), counts))
        elif action in ("end", "restart") and names:
            name = rng.choice(names)
            free += blocks.pop(name)
            serials.pop(name, None)
            slow.dealt.pop(name, None)
            slow.cold.pop(name, None)
            tables.forget([name])
            if action == "restart" and len(free) > 6:  # preempted: the same id comes back with other blocks
                blocks[name] = [free.pop() for _ in range(rng.randint(1, 6))]
        tables.keep_only(serials)
        batch = sorted(blocks)
        if action == "shuffle":
            rng.shuffle(batch)
        check(tables, slow, batch, blocks, rng)


def random_counts(rng: random.Random, supply: list[list[int]], total: int) -> list[list[int]]:
    counts = [[0] * HEADS for _ in range(LAYERS)]
    while total:
        layer, head = rng.randrange(LAYERS), rng.randrange(HEADS)
        if counts[layer][head] < supply[layer][head]:
            counts[layer][head] += 1
            total -= 1
    return counts


def split(ids: list[int], counts: list[list[int]]) -> list[list[list[int]]]:
    return [[[ids.pop(0) for _ in range(n)] for n in layer] for layer in counts]


def check(tables: PageTables, slow: Slow, batch: list[str], blocks: dict[str, list[int]], rng: random.Random) -> None:
    tables.fill([(name, blocks[name]) for name in batch])
    tables.clear_rows(len(batch))
    nominal = [rng.randint((len(blocks[name]) - 1) * SIZE + 1, len(blocks[name]) * SIZE) for name in batch]
    lengths = tables.seq_lens(torch.tensor([*nominal, 0], dtype=torch.int32)[: tables.max_rows])
    for row, name in enumerate(batch):
        source, tokens = tables.source(name, blocks[name], nominal[row])
        for layer in range(LAYERS):
            for head in range(HEADS):
                expected = slow.row(name, blocks[name], layer, head)
                assert tables.tables(len(batch))[layer, row, head, : len(expected)].tolist() == expected
                assert source[layer, head, : len(expected)].tolist() == expected
                length = slow.length(name, nominal[row], layer, head)
                assert lengths[layer, row, head] == length == tokens[layer, head]
                assert length <= tables.longest([(name, nominal[row])])
    assert (lengths[:, len(batch) :] == 0).all(), "a row without a request must read nothing"
    cold = tables.cold(tables.max_rows)
    if cold is None:
        return
    pages, counts = cold
    assert pages.dtype == counts.dtype == torch.int32
    assert counts[:, len(batch) :].eq(0).all(), "a row without a request must read nothing"
    for row, name in enumerate(batch):
        expected = slow.cold.get(name, split([], [[0] * HEADS] * LAYERS))
        found = [[pages[la, row, h, : counts[la, row, h]].tolist() for h in range(HEADS)] for la in range(LAYERS)]
        assert found == expected
        held = tables.cold_held(name)
        assert held.blocks * LAYERS * HEADS == pytest.approx(sum(len(head) for layer in expected for head in layer))


@pytest.mark.parametrize("order", ["LBH", "BLH", "BHL", "LHB"])
def test_pages_of_every_head_major_order(order: str) -> None:
    pool = make_pool(order)
    ids = pool.ids(torch.arange(BLOCKS))
    assert sorted(ids.flatten().tolist()) == list(range(LAYERS * BLOCKS * HEADS))
    pool.flat[int(ids[2, 1, 17])] = 7.0
    assert (pool.flat == 7.0).sum() == SIZE * 2 * DIM


def test_a_cache_that_is_not_one_array_of_pages_is_refused() -> None:
    apart = [torch.zeros(BLOCKS, HEADS, SIZE, 2 * DIM) for _ in range(2)]
    with pytest.raises(ValueError, match="share one allocation"):
        PagePool(apart)
    heads_inside = torch.zeros(LAYERS, BLOCKS, SIZE, HEADS, 2 * DIM).transpose(2, 3)
    with pytest.raises(ValueError, match="head-major"):
        PagePool(list(heads_inside))
    memory = torch.zeros(BLOCKS + 1, HEADS, SIZE, 2 * DIM)
    with pytest.raises(ValueError, match="overlap"):
        PagePool([memory[:BLOCKS], memory[1:]])


def test_a_stale_table_is_an_error() -> None:
    pool = make_pool()
    tables = PageTables(pool, 2, 40, fixed=False)
    tables.put("r", 3, 1, torch.ones(LAYERS, HEADS, dtype=torch.int64), pool.ids(torch.tensor([5])).flatten())
    tables.keep_only({"r": 3})
    with pytest.raises(RuntimeError, match="compaction 4.*compaction 3"):
        tables.keep_only({"r": 4})
    with pytest.raises(RuntimeError, match="worker has none"):
        tables.keep_only({"r": 3, "s": 1})


@pytest.mark.parametrize("fixed", [True, False])
def test_tables_whose_addresses_may_not_change_have_an_end(fixed: bool) -> None:
    pool = make_pool()
    tables = PageTables(pool, 1, 4, fixed=fixed, cold=True)
    counts = torch.full((LAYERS, HEADS), 5)
    numbers = pool.ids(torch.arange(1, 6))
    cold = ColdPages(counts, numbers, numbers.long(), None)
    tables.put("r", 1, 1, counts - 4, pool.ids(torch.tensor([0])).flatten(), cold=cold)
    if fixed:
        with pytest.raises(RuntimeError, match="5 cold pages, but there is room for 4"):
            tables.fill([("r", [0])])
        return
    tables.fill([("r", [0])])
    pages, used = tables.cold(1) or ()
    assert torch.equal(pages[:, 0, :, :5], numbers) and bool((used == 5).all())


def test_cold_pages_are_counted_in_the_bytes_of_the_tables() -> None:
    plain, cold = (PageTables(make_pool(), 2, 40, fixed=True, cold=coded) for coded in (False, True))
    assert plain.cold(2) is None
    pages, counts = cold.cold(2) or ()
    assert cold.size_bytes - plain.size_bytes == 4 * LAYERS * 2 * HEADS * (40 + 1)
    assert pages.shape == (LAYERS, 2, HEADS, 40) and counts.shape == (LAYERS, 2, HEADS)


def test_a_pair_wider_than_a_request_can_be_is_an_error() -> None:
    tables = PageTables(make_pool(), 1, 20, fixed=False)
    with pytest.raises(RuntimeError, match="21 pages"):
        tables.fill([("r", list(range(21)))])
