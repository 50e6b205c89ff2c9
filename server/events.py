# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The state as server-sent events, for any number of clients at the cost of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from deltamem_vllm.server.schemas import Problem, State
from deltamem_vllm.server.source import EnginesUnavailable

KEEP_ALIVE_S = 15.0
"""A line at least this often: proxies close connections on which nothing is sent."""

# How long a client that waits may not notice that the server shuts down, which waits for its clients.
_LOOK_UP_S = 0.5
# A state this much of an interval old is not sent again: clocks of waiting tasks are not exact.
_FRESH = 0.9


class SharedPoll:
    """Asks the engines for all streaming clients: while one state is fresh, nobody asks again.

    However many clients there are, the engines are asked about once in the shortest interval, and not at all while
    nobody streams. An answer is also turned into text only once.

    Parameters
    ----------
    ask: fetches the state; raises `EnginesUnavailable` if the engines do not answer.
    """

    def __init__(self, ask: Callable[[], Awaitable[State]]) -> None:
        self._ask = ask
        self._asked_at = 0.0
        self._task: asyncio.Task[str] | None = None

    def newest(self, max_age: float) -> asyncio.Task[str]:
        """The newest event as text, asked for at most ``max_age`` seconds ago; do not cancel it, others wait too."""
        now = asyncio.get_running_loop().time()
        task = self._task
        if task is None or (task.done() and now - self._asked_at > max_age):
            task, self._asked_at = asyncio.create_task(self._event()), now
            self._task = task
        return task

    async def _event(self) -> str:
        try:
            state = await self._ask()
        except EnginesUnavailable as error:
            return event("error", Problem(reason=str(error)).model_dump_json())
        return event("state", state.model_dump_json())


def event(name: str, data: str) -> str:
    """One server-sent event; ``data`` is one line."""
    return f"event: {name}\ndata: {data}\n\n"


async def stream(poll: SharedPoll, interval: float, closing: Callable[[], bool]) -> AsyncIterator[str]:
    """An event every ``interval`` seconds, the first at once, until the server is closing.

    Parameters
    ----------
    poll: shared with all other clients of this server.
    interval: seconds.
    closing: whether the server shuts down. It would wait for this stream to end.
    """
    clock = asyncio.get_running_loop().time
    spoke = due = clock()
    while not closing():
        due += interval
        task = poll.newest(max_age=_FRESH * interval)
        while not closing():
            answered, _ = await asyncio.wait({task}, timeout=_LOOK_UP_S)
            if answered:
                break
            if clock() - spoke >= KEEP_ALIVE_S - _LOOK_UP_S:
                yield ": waiting for the engines\n\n"
                spoke = clock()
        else:
            return
        yield task.result()
        spoke = clock()
        # An answer that took longer than the interval is followed by the next one, not by several to catch up.
        due = max(due, spoke)
        while (left := due - clock()) > 0 and not closing():
            await asyncio.sleep(min(left, _LOOK_UP_S))
            if clock() - spoke >= KEEP_ALIVE_S - _LOOK_UP_S:
                yield ": nothing new yet\n\n"
                spoke = clock()
