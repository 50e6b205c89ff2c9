# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Follows one server for as long as the process lives, and keeps what was heard last."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from deltamem_vllm.watching.client import ServerClient, WatchError

HISTORY_S = 600.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0
# What the time-line needs of an engine; the rest of it would only be memory.
_KEPT_LEVELS = ("logical_tokens", "resident_tokens", "logical_bytes", "tier_bytes")


@dataclass(frozen=True)
class Health:
    """Whether a server answers.

    Parameters
    ----------
    status : {"connecting", "live", "down"}
        `down` also when the server answers but its engines do not.
    reason : str or None
        Why it is down.
    since : float
        Unix time of the last change of status.
    heard : float or None
        Unix time at which the last state arrived.
    retry_in_s : float or None
        Seconds from the failure to the next attempt.
    """

    status: Literal["connecting", "live", "down"]
    reason: str | None
    since: float
    heard: float | None = None
    retry_in_s: float | None = None


class Watcher:
    """Follows a server's stream, connecting again with growing pauses when it breaks.

    Everything runs in one event loop. Any number of readers wait for `changed`; a slow one skips states instead
    of piling them up.
    """

    def __init__(self, client: ServerClient, interval: float = 1.0) -> None:
        self.client = client
        self.interval = interval
        self.health = Health("connecting", None, time.time())
        self.state: dict[str, Any] | None = None
        self.history: deque[dict[str, Any]] = deque()
        self.version = 0
        self._condition = asyncio.Condition()

    async def run(self) -> None:
        """Follow the server until cancelled."""
        try:
            await self._follow()
        except Exception as error:
            # A bug: nobody may go on reading old numbers as if they were new.
            await self._change("down", f"the watcher of this server failed: {type(error).__name__}: {error}", None)
            raise

    async def _follow(self) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            try:
                async for kind, data in self.client.stream(self.interval):
                    wait_s = FIRST_WAIT_S
                    if kind == "state":
                        await self._heard(data)
                    else:
                        await self._change("down", str(data.get("reason", "the engines do not answer")), None)
            except WatchError as error:
                # Spread out, so that a restarted server is not met by all of its watchers at once.
                pause = wait_s * random.uniform(0.8, 1.2)
                await self._change("down", error.reason, pause)
                await asyncio.sleep(pause)
                wait_s = min(LONGEST_WAIT_S, 2 * wait_s)

    async def changed(self, version: int, timeout_s: float) -> int:
        """Wait until something else than `version` is known, at most `timeout_s`; return what is known now."""
        async with self._condition:
            try:
                await asyncio.wait_for(self._condition.wait_for(lambda: self.version != version), timeout_s)
            except TimeoutError:
                return self.version
        return self.version

    async def wake(self) -> None:
        """Let everyone who waits look again."""
        async with self._condition:
            self.version += 1
            self._condition.notify_all()

    def summary(self) -> dict[str, Any]:
        """Health and the few numbers of the list of servers."""
        stats = (self.state or {}).get("stats", {})
        return {**asdict(self.health), "model": stats.get("model"), "version": stats.get("version")} | _usage(stats)

    async def _heard(self, state: dict[str, Any]) -> None:
        stats = state.get("stats")
        if not isinstance(stats, dict) or not isinstance(stats.get("engines"), list):
            raise WatchError(f"{self.client.address.url} sent a state without stats; is it another version?")
        self.state = state
        now = time.time()
        self.history.append({"at": state.get("at", now), "stats": _thin(stats)})
        while self.history and self.history[0]["at"] < now - HISTORY_S:
            self.history.popleft()
        since = self.health.since if self.health.status == "live" else now
        self.health = Health("live", None, since, now)
        await self.wake()

    async def _change(self, status: Literal["down"], reason: str, retry_in_s: float | None) -> None:
        since = self.health.since if self.health.status == status else time.time()
        self.health = Health(status, reason, since, self.health.heard, retry_in_s)
        await self.wake()


def _thin(stats: Mapping[str, Any]) -> dict[str, Any]:
    """The same shape with less in it."""
    engines = []
    for engine in stats["engines"]:
        levels = engine.get("totals", {}).get("levels", {})
        kept = {name: levels[name] for name in _KEPT_LEVELS if name in levels}
        engines.append(
            {"engine": engine.get("engine"), "pool": engine.get("pool", {}), "totals": {"levels": kept, "counters": {}}}
        )
    return {"engines": engines}


def _usage(stats: Mapping[str, Any]) -> dict[str, Any]:
    from deltamem_vllm.watching.totals import Totals

    if not stats:
        return {"pool_bytes": None, "used_bytes": None, "running": None, "waiting": None}
    totals = Totals.of(stats)
    return {
        "pool_bytes": totals.pool_bytes,
        "used_bytes": totals.used_bytes,
        "running": totals.running,
        "waiting": totals.waiting,
    }
