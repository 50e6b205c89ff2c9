# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The JSON routes and the dashboard inside vLLM's API server.

vLLM has a contract for routes (`vllm.endpoint_plugins`) but loads such plugins only when the environment
variable VLLM_PLUGINS names them, which also turns every unnamed plugin off. `install` therefore hands our
plugin object, written to that contract, to the function that loads them.
"""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deltamem_vllm.config import DeltaMemConfig

if TYPE_CHECKING:
    # This module is imported in every vLLM process; FastAPI and the engine only where they are in use.
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


def install() -> None:
    """Enter vLLM: called by `plugin.register()` in every process, any number of times."""
    _install_endpoint()
    if "vllm.v1.engine.core" in sys.modules:
        # Not imported for its own sake: it costs every `vllm` command two seconds. Engine processes have
        # it loaded when they load plugins; in all other cases the scheduler's constructor comes later.
        from deltamem_vllm.integration import engine_rpc

        engine_rpc.install()


def _install_endpoint() -> None:
    from deltamem_vllm.integration import ledger

    ledger.apply("vllm.plugins:load_endpoint_plugins", _with_our_endpoint)


def _with_our_endpoint(load: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    @functools.wraps(load)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        return [*load(*args, **kwargs), DeltaMemEndpoint()]

    return load_endpoint_plugins


class DeltaMemEndpoint:
    """The routes under `/deltamem`, to vLLM's EndpointPlugin contract.

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
        from deltamem_vllm.integration.engine_source import EngineSource
        from deltamem_vllm.integration.metrics import model_name, resolved_config
        from deltamem_vllm.integration.request_validation import refusals
        from deltamem_vllm.server.answers import Answers
        from deltamem_vllm.server.auth import ApiKeys
        from deltamem_vllm.server.dashboard.pages import create_pages_router
        from deltamem_vllm.server.routes import create_requests_router, create_router

        config = resolved_config(engine_client.vllm_config)
        if config is None:
            return
        if self._app is None:
            raise RuntimeError("vLLM called init_state before attach_router; this vLLM is not supported")
        answers = Answers(EngineSource(engine_client), refusals, model_name(engine_client.model_config))
        keys, shown = ApiKeys(_api_keys(args)), DeltaMemConfig.from_dict(config).dashboard
        self._app.include_router(create_router(answers, config, keys, ids=shown))
        if shown:
            self._app.include_router(create_requests_router(answers, keys, lambda: _closing(state)))
            self._app.include_router(create_pages_router())
        self._app.openapi_schema = None  # vLLM builds the schema once; ours must be in it


def _api_keys(args: Namespace) -> list[str]:
    """The keys that vLLM asks for: those of the flag, else the one of the environment variable."""
    from vllm import envs

    return [key for key in (getattr(args, "api_key", None) or [envs.VLLM_API_KEY]) if key]


def _closing(state: State) -> bool:
    """Whether the server was told to stop. It then waits for open connections, so streams have to end by themselves."""
    # vLLM puts its uvicorn server there when it starts to serve.
    server = getattr(state, "server", None)
    return server is not None and bool(server.should_exit)
