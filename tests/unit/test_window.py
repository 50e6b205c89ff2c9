# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The observation window against a list that simply remembers the last queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltamem_vllm.scoring.window import ObservationWindow, record


def new_window(window=4, requests=3, tokens=64):
    return ObservationWindow(window, requests, tokens, [(2, 3)], torch.float32, torch.device("cpu"))


def play(window, memory, positions, batch, padded_extra, tick):
    """One step: rows of (request, tokens); returns the number that makes every query unique."""
    ids, firsts, counts, queries = [], [], [], []
    for request, count in batch:
        ids.append(request)
        firsts.append(positions.get(request, 0))
        counts.append(count)
        for i in range(count):
            tick += 1
            queries.append(torch.full((2, 3), float(tick)))
            memory.setdefault(request, []).append((firsts[-1] + i, float(tick)))
        positions[request] = firsts[-1] + count
    total = sum(counts)
    queries += [torch.full((2, 3), -1.0)] * padded_extra
    write = window.begin_step(ids, firsts, counts, total + padded_extra)
    record(window.rings[0], write, torch.stack(queries))
    return tick


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_window_holds_the_last_queries_of_every_request(data):
    window, memory, positions, tick = new_window(), {}, {}, 0
    for _ in range(data.draw(st.integers(1, 12))):
        names = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
        batch = [(n, data.draw(st.integers(1, 9))) for n in names]
        gone = data.draw(st.sampled_from([None, "a", "b", "c"]))
        if gone is not None:  # finished or preempted: starts over
            window.release({gone})
            memory.pop(gone, None)
            positions.pop(gone, None)
        tick = play(window, memory, positions, batch, data.draw(st.integers(0, 5)), tick)
        for request, seen in memory.items():
            got = window.rings[0].index_select(0, window.rows(request))[:, 0, 0].tolist()
            assert got == [value for _, value in seen[-4:]]


def test_a_jump_in_positions_starts_the_window_over():
    window = new_window()
    first = window.begin_step(["a"], [0], [6], 6)
    record(window.rings[0], first, torch.ones(6, 2, 3))
    second = window.begin_step(["a"], [32], [2], 2)  # as after a prefix-cache hit
    record(window.rings[0], second, torch.full((2, 2, 3), 5.0))
    assert window.rings[0].index_select(0, window.rows("a"))[:, 0, 0].tolist() == [5.0, 5.0]


def test_dummy_batches_leave_every_request_alone():
    window = new_window()
    record(window.rings[0], window.begin_step(["a"], [0], [4], 4), torch.ones(4, 2, 3))
    record(window.rings[0], window.idle(8), torch.full((8, 2, 3), 9.0))
    assert window.rings[0].index_select(0, window.rows("a")).eq(1).all()


def test_index_buffers_keep_their_address():
    """What a captured graph relies on."""
    window = new_window()
    addresses = {
        window.idle(3).target.data_ptr(),
        window.begin_step(["a", "b"], [0, 0], [1, 1], 3).target.data_ptr(),
        window.begin_step(["a"], [1], [9], 9).target.data_ptr(),
    }
    assert len(addresses) == 1


def test_asking_for_an_unobserved_request_is_an_error():
    with pytest.raises(RuntimeError, match="not observed"):
        new_window().rows("nobody")
