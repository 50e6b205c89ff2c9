# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The routes inside vLLM's API server: which there are, whose key they ask for, and what they ask the engines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from deltamem_vllm.integration import engine_rpc, engine_source, http

CONFIG = {"mode": "always", "keep_ratio": 0.25, "scorer": "delta"}


def _vllm_config(additional_config: dict[str, Any]) -> Any:
    return SimpleNamespace(additional_config=additional_config, model_config=SimpleNamespace(served_model_name="tiny"))


def test_endpoint_is_handed_to_vllm_once() -> None:
    import vllm.plugins

    http.install()
    http.install()
    loaded = vllm.plugins.load_endpoint_plugins(("generate",))
    assert [type(plugin) for plugin in loaded].count(http.DeltaMemEndpoint) == 1


class _Engine:
    """The part of AsyncLLM that the endpoint reads."""

    def __init__(self, additional_config: dict[str, Any], answers: Any) -> None:
        self.vllm_config = _vllm_config(additional_config)
        self.model_config = self.vllm_config.model_config
        self.engine_core = self
        self.asked: list[tuple[Any, ...]] = []
        self._answers = answers

    async def call_utility_all_async(self, method: str, *args: Any) -> Any:
        self.asked.append((method, *args))
        return await self._answers()


def _attach(engine: _Engine | None, **args: Any) -> FastAPI:
    import asyncio
    from argparse import Namespace

    from vllm.plugins.endpoint_plugins import interface

    http.install()
    app = FastAPI()
    interface.attach_endpoint_plugins(app, ("generate",))
    asyncio.run(interface.init_endpoint_plugins_state(engine, app.state, Namespace(**args)))  # type: ignore[arg-type]
    return app


def _paths(app: FastAPI) -> set[str]:
    return {path for path in app.openapi()["paths"] if path.startswith("/deltamem")}


def _get(app: FastAPI, path: str, key: str | None = None) -> Any:
    from fastapi.testclient import TestClient

    return TestClient(app).get(path, headers={} if key is None else {"Authorization": f"Bearer {key}"})


ALWAYS = {"/deltamem/stats", "/deltamem/config"}
OF_REQUESTS = {"/deltamem/requests", "/deltamem/requests/{request_id}/layers", "/deltamem/stream"}


async def _nothing() -> list[Any]:
    return []


def test_routes_exist_only_with_the_flag() -> None:
    assert _paths(_attach(None)) == set(), "the render server has no engine"
    assert _paths(_attach(_Engine({}, _nothing))) == set()
    app = _attach(_Engine({"deltamem": CONFIG}, _nothing))
    assert _paths(app) >= ALWAYS | OF_REQUESTS
    assert _get(app, "/deltamem/dashboard").status_code == 200
    assert _get(app, "/deltamem/config").json()["config"] == CONFIG


def test_without_the_dashboard_no_route_shows_requests() -> None:
    app = _attach(_Engine({"deltamem": {**CONFIG, "dashboard": False}}, _nothing))
    assert _paths(app) == ALWAYS
    for path in ("dashboard", "requests", "requests/r/layers", "stream"):
        assert _get(app, f"/deltamem/{path}").status_code == 404


@pytest.mark.parametrize(
    ("flag", "variable", "right", "wrong"),
    [
        (["one", "two"], None, ["one", "two"], ["three", ""]),
        (None, "three", ["three"], ["one", "None", ""]),
        (["one"], "three", ["one"], ["three"]),  # the flag replaces the variable, as in vLLM
        ([""], None, ["anything"], []),
        (None, None, ["anything"], []),
    ],
)
def test_the_keys_are_those_of_vllm(
    monkeypatch: pytest.MonkeyPatch, flag: list[str] | None, variable: str | None, right: list[str], wrong: list[str]
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    app = _attach(_Engine({"deltamem": CONFIG}, _nothing), api_key=flag)
    for key in right:
        assert _get(app, "/deltamem/requests", key).status_code == 200
    for key in wrong:
        assert _get(app, "/deltamem/requests", key).status_code == 401
    assert _get(app, "/deltamem/requests").status_code == (401 if wrong else 200)
    assert _get(app, "/deltamem/stats").status_code == 200


def test_layers_are_asked_of_every_engine_and_answered_by_one() -> None:
    view = {"request": "r", "engine": 1, "logical_tokens": 9, "layers": 1, "kv_heads": 1}
    view |= {"hot_tokens": [[4.0]], "cold_tokens": [[0.0]]}

    async def second() -> list[Any]:
        return [{"engine": 0}, view]

    engine = _Engine({"deltamem": CONFIG}, second)
    assert _get(_attach(engine), "/deltamem/requests/r/layers?engine=1").json() == view
    assert engine.asked == [("deltamem_layers", 1, "r")]

    async def nowhere() -> list[Any]:
        return [{"engine": 0}, {"engine": 1}]

    absent = _get(_attach(_Engine({"deltamem": CONFIG}, nowhere)), "/deltamem/requests/r/layers?engine=7")
    assert absent.status_code == 404
    assert absent.json()["reason"].startswith("engine: got 7, but this server has 0, 1")


@pytest.mark.parametrize("path", ["stats", "requests", "requests/r/layers"])
def test_failed_engine_call_is_503(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    import asyncio

    async def fail() -> list[Any]:
        raise Exception("Call to deltamem_stats method failed: boom")

    async def hang() -> list[Any]:
        await asyncio.sleep(3600)
        return []

    async def off() -> list[Any]:
        return [{"engine": 1, "active": False}]

    monkeypatch.setattr(engine_source, "ENGINE_TIMEOUT_S", 0.05)
    for answers, reason in (
        (fail, "Exception: Call to deltamem_stats method failed: boom"),
        (hang, "the engine did not answer within 0.05 s"),
        (off, "engines [1] run without the deltamem scheduler"),
    ):
        answer = _get(_attach(_Engine({"deltamem": CONFIG}, answers)), f"/deltamem/{path}")
        assert (answer.status_code, answer.json()) == (503, {"reason": reason})


def test_engine_method_reports_the_scheduler_and_its_number() -> None:
    from vllm.v1.engine.core import EngineCore

    engine_rpc.install()
    method: Any = EngineCore.deltamem_stats  # type: ignore[attr-defined]
    ours = SimpleNamespace(deltamem_stats=lambda: {"totals": {}})
    assert method(SimpleNamespace(scheduler=ours, engine_index=3)) == {
        "engine": 3,
        "active": True,
        "totals": {},
    }
    assert method(SimpleNamespace(scheduler=object())) == {"engine": 0, "active": False}


def test_layers_of_tensor_parallel_ranks_stand_side_by_side() -> None:
    from vllm.v1.engine.core import EngineCore

    from deltamem_vllm.integration.request_view import Held

    engine_rpc.install()
    asked: list[Any] = []

    def collective_rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        asked.append((method, args))
        return [
            {"hot": [[1.0, 2.0], [3.0, 4.0]], "cold": [[0.0] * 2] * 2},
            {"hot": [[5.0], [6.0]], "cold": [[7.0]] * 2},
        ]

    scheduler = SimpleNamespace(deltamem_held=lambda name: Held(90, 30, 4) if name == "r" else f"{name} has ended")
    engine = SimpleNamespace(scheduler=scheduler, engine_index=2, collective_rpc=collective_rpc)
    method: Any = EngineCore.deltamem_layers  # type: ignore[attr-defined]
    assert method(engine, 2, "r") == {
        "request": "r",
        "engine": 2,
        "logical_tokens": 90,
        "layers": 2,
        "kv_heads": 3,
        "hot_tokens": [[1.0, 2.0, 5.0], [3.0, 4.0, 6.0]],
        "cold_tokens": [[0.0, 0.0, 7.0]] * 2,
    }
    assert asked == [("deltamem_layers", ("r", 4, 30))]
    assert method(engine, 0, "r") == {"engine": 2}
    assert method(engine, 2, "gone") == {"engine": 2, "missing": "gone has ended"}
    assert len(asked) == 1, "workers are asked for nothing"
