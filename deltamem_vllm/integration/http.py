# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The JSON routes inside vLLM's API server, and the engine method they ask.

Numbers are asked from the engines at the moment of the request. What an API server has heard itself is
only its share: with several of them each step's stats reach one (see `metrics.py`).

vLLM has a contract for routes (`vllm.endpoint_plugins`) but loads such plugins only when the environment
variable VLLM_PLUGINS names them, which also turns every unnamed plugin off. `install` therefore hands our
plugin object, written to that contract, to the function that loads them.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # This module is imported in every vLLM process; FastAPI and the engine only where they are in use.
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

# An engine answers between two steps, so this bounds the longest step that a reader waits for.
ENGINE_TIMEOUT_S = 10.0
_ENGINE_METHOD = "deltamem_stats"


def install() -> None:
    """Enter vLLM: called by `plugin.register()` in every process, any number of times."""
    _install_endpoint()
    if "vllm.v1.engine.core" in sys.modules:
        # Not imported for its own sake: it costs every `vllm` command two seconds. Engine processes have
        # it loaded when they load plugins; in all other cases the scheduler's constructor comes later.
        install_engine_rpc()


def _install_endpoint() -> None:
    from deltamem_vllm.integration import ledger

    ledger.apply("vllm.plugins:load_endpoint_plugins", _with_our_endpoint)


def _with_our_endpoint(load: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    @functools.wraps(load)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        return [*load(*args, **kwargs), DeltaMemEndpoint()]

    return load_endpoint_plugins


def install_engine_rpc() -> None:
    """Give EngineCore the utility method `deltamem_stats`.

    Called by the scheduler's constructor as well as by `install`: the scheduler is always built in the
    process of its engine, however that process was started and whether or not plugins were loaded anew.
    """
    from vllm.v1.engine.core import EngineCore

    EngineCore.deltamem_stats = _engine_stats  # type: ignore[attr-defined]


def _engine_stats(engine: Any) -> dict[str, Any]:
    """Run in the engine: its number and what its scheduler counted.

    Returns
    -------
    dict
        `{"engine": int, "active": True, ...scheduler.deltamem_stats()}`, or `active: False` alone when the
        scheduler is not ours.
    """
    # Only engines in a process of their own are numbered; the in-process one is alone.
    answer = {"engine": getattr(engine, "engine_index", 0)}
    report = getattr(engine.scheduler, _ENGINE_METHOD, None)
    return {**answer, "active": False} if report is None else {**answer, "active": True, **report()}


class DeltaMemEndpoint:
    """`GET /deltamem/stats` and `/deltamem/config`, to vLLM's EndpointPlugin contract.

    Whether the policy is on is known for sure only from the engine's config, which arrives in `init_state`;
    so the app is remembered first and gets its routes there. Without the flag it gets none.
    """

    name = "deltamem"
    required_tasks = None

    def __init__(self) -> None:
        self._app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Remember the app (vLLM's phase A)."""
        self._app = app

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Add the routes if the policy is on (vLLM's phase B)."""
        if engine_client is None:  # the render server has no engine, so nothing to report
            return
        from deltamem_vllm.integration.metrics import model_name, resolved_config
        from deltamem_vllm.server.routes import create_router

        config = resolved_config(engine_client.vllm_config)
        if config is None:
            return
        if self._app is None:
            raise RuntimeError("vLLM called init_state before attach_router; this vLLM is not supported")
        model = model_name(engine_client.model_config)
        self._app.include_router(create_router(_fetcher(engine_client), config, model))
        self._app.openapi_schema = None  # vLLM builds the schema once; ours must be in it


def _fetcher(engine_client: Any) -> Callable[[], Awaitable[list[dict[str, Any]]]]:
    """Return the function that asks every engine this API server talks to."""
    from deltamem_vllm.server.routes import StatsUnavailable

    async def fetch() -> list[dict[str, Any]]:
        call = engine_client.engine_core.call_utility_all_async(_ENGINE_METHOD)
        try:
            reports: list[dict[str, Any]] = await asyncio.wait_for(call, ENGINE_TIMEOUT_S)
        except TimeoutError:
            raise StatsUnavailable(f"the engine did not answer within {ENGINE_TIMEOUT_S:g} s") from None
        except Exception as error:  # vLLM reports a failed utility call as a bare Exception
            raise StatsUnavailable(f"{type(error).__name__}: {error}") from error
        off = [report["engine"] for report in reports if not report["active"]]
        if off:
            raise StatsUnavailable(f"engines {off} run without the deltamem scheduler")
        return reports

    return fetch
