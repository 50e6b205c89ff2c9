# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A server to watch without vLLM: the real routes over engines that are made up, on a real port."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from deltamem_vllm.server.answers import Answers
from deltamem_vllm.server.auth import ApiKeys
from deltamem_vllm.server.routes import create_requests_router, create_router
from deltamem_vllm.server.source import EnginesUnavailable, NotRunning
from deltamem_vllm.telemetry import Telemetry

CONFIG = {"mode": "always", "keep_ratio": 0.25, "scorer": "auto", "cold_bits": "auto"}
BLOCK_TOKENS, TOKEN_BYTES = 32, 23_040
LAYERS, KV_HEADS = 30, 3
HOSTILE_ID = '<img src=x onerror="document.title=1">/&amp;\x1b[31m'


class MadeUpEngines:
    """Engines that hold what the tests say; see `deltamem_vllm.server.source.Engines`.

    Parameters
    ----------
    engines : int
        How many.
    lively : bool
        Numbers follow the clock, to look at; otherwise they only change when a test changes them.
    """

    def __init__(self, engines: int = 1, *, lively: bool = False) -> None:
        self.engines = engines
        self.lively = lively
        self.down: str | None = None
        self.compactions = 3
        self.blocks = 512
        self.rows = [row("cmpl-large", 4000, 0.25, 0.3), row(HOSTILE_ID, 900, 0.5, 0.0), row("cmpl-new", 300, 1, 0, 0)]
        self.asked_layers: list[tuple[int, str]] = []

    async def stats(self) -> list[dict[str, Any]]:
        self._check()
        return [self._stats(number) for number in range(self.engines)]

    async def requests(self, limit: int) -> list[dict[str, Any]]:
        self._check()
        return [self._requests(number, limit) for number in range(self.engines)]

    async def state(self, limit: int) -> list[dict[str, Any]]:
        self._check()
        return [{"stats": self._stats(n), "requests": self._requests(n, limit)} for n in range(self.engines)]

    async def layers(self, engine: int, request_id: str) -> dict[str, Any]:
        self._check()
        self.asked_layers.append((engine, request_id))
        found = next((one for one in self._now() if one["id"] == request_id), None)
        if found is None or engine >= self.engines:
            raise NotRunning(f"{request_id!r} is not running in engine {engine}")
        hot, cold = ([[0.0] * KV_HEADS for _ in range(LAYERS)] for _ in range(2))
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                worth = 0.5 + 0.5 * math.sin(layer * 1.7 + head * 2.1) * math.cos(layer / 7)
                hot[layer][head] = round(found["resident_tokens"] * 0.7 * (0.1 + worth))
                cold[layer][head] = round(found["cold_tokens"] * 0.6 * (1.2 - worth))
        return {
            "request": request_id,
            "engine": engine,
            "logical_tokens": found["logical_tokens"],
            "layers": LAYERS,
            "kv_heads": KV_HEADS,
            "hot_tokens": hot,
            "cold_tokens": cold,
        }

    def _check(self) -> None:
        if self.down is not None:
            raise EnginesUnavailable(self.down)

    def _now(self) -> list[dict[str, Any]]:
        if not self.lively:
            return self.rows
        now = time.time()
        live = []
        for slot in range(14):
            age = (now + 37 * slot) % (60 + 9 * slot)
            seen = int(500 + 160 * slot + 14 * age)
            kept = 1.0 if age < 6 else max(0.1, 0.55 - age / 150)
            born = int((now - age) // 1)
            name = f"cmpl-{born * 2654435761 % 2**32:08x}{slot:02d}"
            live.append(row(name, seen, kept, 0.0 if age < 6 else 0.4, age=age))
        live[3]["status"], live[5]["status"] = "waiting", "preempted"
        return sorted([*live, self.rows[1]], key=lambda one: -int(one["hot_bytes"]) - int(one["cold_bytes"]))

    def _stats(self, engine: int) -> dict[str, Any]:
        counted, rows = Telemetry(), self._now()
        compactions = self.compactions + (int(time.time() * 1.3) % 10**6 if self.lively else 0)
        counted.count("compactions", compactions)
        counted.count("evicted_tokens", 900 * compactions)
        counted.count("freed_blocks", 28 * compactions)
        counted.count("compaction_us", 21_000 * compactions)
        counted.count("skipped", 2, label="shared_prefix")
        counted.level("logical_tokens", sum(one["logical_tokens"] for one in rows))
        counted.level("resident_tokens", sum(one["resident_tokens"] for one in rows))
        counted.level("logical_bytes", sum(one["logical_tokens"] for one in rows) * TOKEN_BYTES)
        for tier in ("hot", "cold"):
            counted.level("tier_bytes", sum(one[f"{tier}_bytes"] for one in rows), label=tier)
        return {
            "engine": engine,
            "active": True,
            "totals": counted.totals(),
            "pool": {
                "blocks": self.blocks,
                "free_blocks": self.blocks - sum(one["blocks"] for one in rows),
                "block_tokens": BLOCK_TOKENS,
                "block_bytes": BLOCK_TOKENS * TOKEN_BYTES,
            },
            "requests": {"running": len(rows), "waiting": 4, "compacted": sum(one["compactions"] > 0 for one in rows)},
            "recent": _events(rows),
        }

    def _requests(self, engine: int, limit: int) -> dict[str, Any]:
        rows = self._now()
        return {"engine": engine, "total": len(rows), "requests": rows[:limit]}


class MadeUpRefusals:
    """See `deltamem_vllm.server.source.Refusals`."""

    counts: Mapping[str, int] = {"bad_option": 1, "does_not_fit": 0}

    def newest_first(self) -> list[dict[str, Any]]:
        detail = "deltamem_keep_ratio: got 1.5, allowed: > 0 and <= 1"
        return [{"at": time.time() - 90, "kind": "refused", "reason": "bad_option", "request": None, "detail": detail}]


def row(name: str, seen: int, kept: float, cold: float, compactions: int = 2, age: float = 12.5) -> dict[str, Any]:
    """One live request that has computed `seen` tokens and holds the share `kept` of their bytes, `cold` of it cold."""
    resident = int(seen * kept)
    held = resident * TOKEN_BYTES
    return {
        "id": name,
        "status": "running",
        "mode": "always",
        "scorer": "predictor",
        "dealing": "global",
        "prompt_tokens": seen - 10,
        "logical_tokens": seen,
        "resident_tokens": resident,
        "kept_share": kept,
        "hot_bytes": held - int(held * cold),
        "cold_bytes": int(held * cold),
        "cold_tokens": resident * cold * 3.6,
        "blocks": math.ceil(resident / BLOCK_TOKENS),
        "compactions": compactions if kept < 1 else 0,
        "age_s": age,
    }


def _events(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    now = math.floor(time.time())
    kinds = [
        ("compacted", "budget", "36 of 48 blocks given back"),
        ("skipped", "shared_prefix", "11 blocks shared by 4"),
    ]
    return [
        {"at": float(now - 7 * place), "kind": kind, "reason": reason, "request": one["id"], "detail": detail}
        for place, one in enumerate(rows[:12])
        for kind, reason, detail in [kinds[place % 3 == 2]]
    ]


def made_up_app(engines: MadeUpEngines, key: str | None = None) -> FastAPI:
    """The routes of a vLLM server with the policy, over `engines`."""
    from deltamem_vllm.server.dashboard.pages import create_pages_router

    app = FastAPI()
    answers = Answers(engines, MadeUpRefusals(), "made-up")
    keys = ApiKeys([] if key is None else [key])
    app.include_router(create_router(answers, CONFIG, keys, ids=True))
    app.include_router(create_requests_router(answers, keys, lambda: app.state.closing))
    app.include_router(create_pages_router())
    app.state.closing = False
    return app


@contextmanager
def on_a_port(app: FastAPI, port: int = 0) -> Iterator[str]:
    """Serve `app` in a thread; yields its URL. Streams are told to end by `app.state`."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=2, server_header=False)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        app.state.closing = True
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not end"
