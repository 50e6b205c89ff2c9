# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What an engine says of its single requests: lengths and choices, never their text."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.v1.request import Request, RequestStatus

from deltamem_vllm.integration.manager import DeltaMemManager
from deltamem_vllm.memory.governed import Governed
from deltamem_vllm.memory.tiers import ColdHeld

_NOTHING = ColdHeld(0.0, 0.0)


@dataclass(frozen=True)
class Held:
    """What a running request holds; workers are asked with it which pair holds how much.

    Attributes
    ----------
    logical, resident: tokens, seen and nominally held.
    serial: of the compaction that dealt its pages; 0 if none did.
    """

    logical: int
    resident: int
    serial: int


def held(request_id: str, requests: Mapping[str, Request], manager: DeltaMemManager) -> Held | str:
    """What a request holds, or in words why it holds nothing."""
    request = requests.get(request_id)
    if request is None or request.is_finished():
        return f"request {request_id!r} is not in this engine: it has ended or never was; /deltamem/requests lists them"
    if request.status != RequestStatus.RUNNING:
        return f"request {request_id!r} is {_status(request)} and holds no memory; ask again when it runs"
    logical, resident = _lengths(request, manager)
    return Held(logical, resident, manager.dealt.get(request_id, 0))


def rows(
    requests: Iterable[Request],
    manager: DeltaMemManager,
    governed: Mapping[str, Governed],
    token_bytes: float,
    limit: int,
) -> dict[str, Any]:
    """The live requests with most memory.

    Parameters
    ----------
    requests: of the scheduler.
    manager: of the blocks.
    governed: by request id, those that the policy applies to.
    token_bytes: KV bytes of a token, on one tensor-parallel rank.
    limit: most rows.

    Returns
    -------
    ``total`` and ``requests``, as in the answer of ``GET /deltamem/requests``.
    """
    live = [request for request in requests if not request.is_finished()]
    largest = heapq.nlargest(limit, live, key=lambda request: _lengths(request, manager)[1])
    now = time.time()
    return {
        "total": len(live),
        "requests": [_row(one, manager, governed.get(one.request_id), token_bytes, now) for one in largest],
    }


def _row(
    request: Request, manager: DeltaMemManager, state: Governed | None, token_bytes: float, now: float
) -> dict[str, Any]:
    request_id = request.request_id
    logical, resident = _lengths(request, manager)
    cold = manager.cold.get(request_id, _NOTHING)
    cold_bytes = int(cold.blocks * manager.block_size * token_bytes)
    return {
        "id": request_id,
        "status": _status(request),
        "mode": state.mode if state else None,
        "scorer": state.scorer if state else None,
        "dealing": state.dealing if state else None,
        "prompt_tokens": request.num_prompt_tokens,
        "logical_tokens": logical,
        "resident_tokens": resident,
        "kept_share": resident / logical if logical else 1.0,
        "hot_bytes": int(resident * token_bytes) - cold_bytes,
        "cold_bytes": cold_bytes,
        "cold_tokens": cold.tokens,
        "blocks": len(manager.req_to_blocks.get(request_id, ())),
        "compactions": state.compactions if state else 0,
        # Arrival is stamped by the API server, whose clock may be another one.
        "age_s": max(now - request.arrival_time, 0.0),
    }


def _lengths(request: Request, manager: DeltaMemManager) -> tuple[int, int]:
    """Logical and nominally resident tokens; only a running request has any, as in the levels of `GET /stats`."""
    if request.status != RequestStatus.RUNNING:
        return 0, 0
    logical = request.num_computed_tokens
    return logical, logical - manager.evicted.get(request.request_id, 0)


def _status(request: Request) -> str:
    if request.status == RequestStatus.RUNNING:
        return "running"
    return "preempted" if request.status == RequestStatus.PREEMPTED else "waiting"
