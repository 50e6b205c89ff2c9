# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What an engine can be asked: methods that vLLM's EngineCore gets, found by name when an API server calls them.

They run in the engine's own loop, between two steps: nothing they read changes under them, and the workers have been
given exactly the steps that the scheduler has counted. Engines without a process of their own have them too.
"""

from __future__ import annotations

from typing import Any

LAYERS_METHOD = "deltamem_layers"


def install() -> None:
    """Give EngineCore the methods ``deltamem_stats``, ``_requests``, ``_state`` and ``_layers``.

    Called by the scheduler's constructor as well as when plugins are loaded: the scheduler is always built in the
    process of its engine, however that process was started and whether or not plugins were loaded anew.
    """
    from vllm.v1.engine.core import EngineCore

    for name, method in {"stats": _stats, "requests": _requests, "state": _state, "layers": _layers}.items():
        setattr(EngineCore, f"deltamem_{name}", method)


def _stats(engine: Any) -> dict[str, Any]:
    """Its number and what its scheduler counted.

    Returns
    -------
    dict
        `{"engine": int, "active": True, ...scheduler.deltamem_stats()}`, or `active: False` alone when the
        scheduler is not ours.
    """
    answer = {"engine": _number(engine)}
    report = getattr(engine.scheduler, "deltamem_stats", None)
    return {**answer, "active": False} if report is None else {**answer, "active": True, **report()}


def _requests(engine: Any, limit: int) -> dict[str, Any]:
    """The fields of `EngineRequests`, at most ``limit`` rows; `active: False` beside the number as for `_stats`."""
    report = getattr(engine.scheduler, "deltamem_requests", None)
    answer = {"engine": _number(engine)}
    return {**answer, "active": False} if report is None else {**answer, **report(limit)}


def _state(engine: Any, limit: int) -> dict[str, Any]:
    """`_stats` and `_requests` of one moment."""
    return {"stats": _stats(engine), "requests": _requests(engine, limit)}


def _layers(engine: Any, number: int, request_id: str) -> dict[str, Any]:
    """What each layer and head of a request holds, if it runs in this engine.

    Waits until the workers have done the steps they were given. All engines are asked and only the one meant by
    ``number`` asks its workers.

    Returns
    -------
    dict
        The fields of `LayerView`; or `engine` and `missing`, why there is nothing to tell; or `engine` alone if another
        one is meant.
    """
    own = _number(engine)
    if own != number:
        return {"engine": own}
    held = getattr(engine.scheduler, "deltamem_held", None)
    if held is None:
        return {"engine": own, "active": False}
    found = held(request_id)
    if isinstance(found, str):
        return {"engine": own, "missing": found}
    ranks = engine.collective_rpc(LAYERS_METHOD, args=(request_id, found.serial, found.resident))
    hot, cold = (_joined([rank[tier] for rank in ranks]) for tier in ("hot", "cold"))
    return {
        "request": request_id,
        "engine": own,
        "logical_tokens": found.logical,
        "layers": len(hot),
        "kv_heads": len(hot[0]),
        "hot_tokens": hot,
        "cold_tokens": cold,
    }


def _joined(ranks: list[list[list[float]]]) -> list[list[float]]:
    """Tables ``[layers][heads]`` of tensor-parallel ranks, side by side."""
    return [[tokens for heads in layer for tokens in heads] for layer in zip(*ranks, strict=True)]


def _number(engine: Any) -> int:
    # Only engines in a process of their own are numbered; the in-process one is alone.
    return int(getattr(engine, "engine_index", 0))
