# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Server-sent events: one poll for all clients, errors on the way, an end. Time is the event loop's own, made up."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from deltamem_vllm.server.events import KEEP_ALIVE_S, SharedPoll, stream
from deltamem_vllm.server.schemas import RequestList, State, Stats
from deltamem_vllm.server.source import EnginesUnavailable


class _Clockwork(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing else is left to do."""

    def __init__(self) -> None:
        self.now = 1000.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: _Clockwork) -> None:
        super().__init__()
        self._owner = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self._owner.now += timeout
        return super().select(0)


def run(coroutine: Awaitable[Any]) -> Any:
    loop = _Clockwork()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _state(at: float) -> State:
    stats = Stats(version="1", model="tiny", uptime_s=0, engines=[], refused={}, recent=[])
    return State(at=at, stats=stats, requests=RequestList(version="1", model="tiny", engines=[]))


class Polled:
    """Answers with the time at which it was asked, ``takes`` seconds later."""

    def __init__(self, takes: float = 0.0, broken: Callable[[int], bool] = lambda number: False) -> None:
        self.asked: list[float] = []
        self._takes, self._broken = takes, broken
        self.poll = SharedPoll(self._ask)

    async def _ask(self) -> State:
        now = asyncio.get_running_loop().time()
        self.asked.append(now)
        await asyncio.sleep(self._takes)
        if self._broken(len(self.asked)):
            raise EnginesUnavailable("no answer")
        return _state(now)


async def _take(events: AsyncIterator[str], until: float) -> list[tuple[float, str]]:
    """Events with the time at which they came, up to ``until`` seconds from now."""
    clock = asyncio.get_running_loop().time
    start, found = clock(), []
    async for text in events:
        found.append((clock() - start, text))
        if clock() - start >= until:
            break
    return found


def _never() -> bool:
    return False


def test_the_first_state_comes_at_once_and_then_one_an_interval() -> None:
    polled = Polled()
    found = run(_take(stream(polled.poll, 2.0, _never), until=10.0))
    assert [round(at, 3) for at, _ in found] == [0, 2, 4, 6, 8, 10]
    name, data, *rest = found[0][1].split("\n")
    assert (name, rest) == ("event: state", ["", ""])
    assert set(json.loads(data.removeprefix("data: "))) == {"at", "stats", "requests"}
    assert len({text for _, text in found}) == len(found), "a state was sent twice"


def test_fifty_clients_cost_one_poll_an_interval_and_none_sees_an_old_state() -> None:
    polled = Polled(takes=0.05)

    async def client(number: int) -> list[float]:
        await asyncio.sleep(0.02 * number)
        clock = asyncio.get_running_loop().time
        ages = []
        async for text in stream(polled.poll, 1.0, _never):
            ages.append(clock() - json.loads(text.split("data: ")[1])["at"])
            if len(ages) == 20:
                return ages
        raise AssertionError("the stream ended")

    async def all_of_them() -> list[list[float]]:
        return list(await asyncio.gather(*(client(number) for number in range(50))))

    ages = run(all_of_them())
    assert len(polled.asked) <= 24, "more than one poll an interval"
    assert all(later - earlier >= 0.9 for earlier, later in zip(polled.asked, polled.asked[1:], strict=False))
    assert max(age for of_client in ages for age in of_client) < 1.0


def test_nobody_is_asked_while_nobody_streams() -> None:
    polled = Polled()

    async def scene() -> None:
        await _take(stream(polled.poll, 1.0, _never), until=3.0)
        await asyncio.sleep(100)

    run(scene())
    assert len(polled.asked) == 4


def test_engines_that_do_not_answer_are_an_event_and_the_stream_goes_on() -> None:
    polled = Polled(broken=lambda number: number == 2)
    found = [text for _, text in run(_take(stream(polled.poll, 1.0, _never), until=2.0))]
    assert [text.split("\n")[0] for text in found] == ["event: state", "event: error", "event: state"]
    assert found[1] == 'event: error\ndata: {"reason":"no answer"}\n\n'


@pytest.mark.parametrize(("takes", "interval"), [(0.0, 60.0), (40.0, 1.0)], ids=["long interval", "slow engines"])
def test_something_is_said_every_fifteen_seconds(takes: float, interval: float) -> None:
    found = run(_take(stream(Polled(takes).poll, interval, _never), until=120.0))
    times = [0.0, *(at for at, _ in found)]
    assert max(later - earlier for earlier, later in zip(times, times[1:], strict=False)) <= KEEP_ALIVE_S
    assert sum(text.startswith("event: state") for _, text in found) >= 2
    assert all(text.startswith(("event: state", ": ")) and text.endswith("\n\n") for _, text in found)


def test_an_answer_slower_than_the_interval_is_not_caught_up() -> None:
    polled = Polled(takes=5.0)
    run(_take(stream(polled.poll, 1.0, _never), until=30.0))
    assert all(later - earlier >= 5 for earlier, later in zip(polled.asked, polled.asked[1:], strict=False))


@pytest.mark.parametrize("takes", [0.0, 500.0], ids=["between events", "while engines are asked"])
def test_a_server_that_shuts_down_is_not_kept_by_a_stream(takes: float) -> None:
    closing: list[bool] = []

    async def scene() -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(20, closing.append, True)
        start = loop.time()
        async for _ in stream(Polled(takes).poll, 60.0, lambda: bool(closing)):
            pass
        return loop.time() - start

    assert run(scene()) <= 21


def test_a_client_that_leaves_does_not_take_the_answer_of_others_away() -> None:
    polled = Polled(takes=2.0)

    async def scene() -> list[tuple[float, str]]:
        first = asyncio.ensure_future(_take(stream(polled.poll, 1.0, _never), until=1.0))
        await asyncio.sleep(0.5)
        second = asyncio.ensure_future(_take(stream(polled.poll, 1.0, _never), until=1.0))
        await asyncio.sleep(0.5)
        first.cancel()
        return await second

    assert [text.split("\n")[0] for _, text in run(scene())] == ["event: state"]
    assert len(polled.asked) == 1
