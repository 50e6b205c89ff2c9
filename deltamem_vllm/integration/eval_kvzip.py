# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Lets the evaluation's engine compact with KVzip's scores, which are worked out before a request starts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from deltamem_vllm.evaluation.eval.grid import KVZIP
from deltamem_vllm.evaluation.eval.kvzip import KVzipScorer, Rater
from deltamem_vllm.memory.plans import CompactionPlan


class KVzipReference:
    """Rates prompts, and gives the scorer the right ones when vLLM's worker, in this process, compacts.

    Parameters
    ----------
    worker
        vLLM's, with deltamem's memory in it.
    model
        What vLLM was given.
    device
        Where the second pass is computed.
    keep
        As of `Rater`.
    """

    def __init__(self, worker: Any, model: str, device: str, keep: int) -> None:
        self._compactor = worker.deltamem.compactor
        self._run: Callable[[CompactionPlan], None] = self._compactor.run
        self._compactor.run = self._watched_run
        self._model, self._device, self._keep = model, device, keep
        self._rater: Rater | None = None
        self._scores: dict[str, Tensor] = {}

    def prepare(self, request_id: str, prompt: Collection[int]) -> None:
        """Rate a request's prompt; `request_id` is the scheduler's. Takes as long as the model reads it twice."""
        if self._rater is None:  # a second copy of the weights, only where it is needed
            self._rater = Rater(self._model, self._device, self._keep)
        self._scores[request_id] = self._rater.rate(tuple(prompt))

    def forget(self, request_id: str) -> None:
        """A request is finished."""
        self._scores.pop(request_id, None)

    def _watched_run(self, plan: CompactionPlan) -> None:
        if plan.scorer != KVZIP:
            self._run(plan)
            return
        KVzipScorer.scores = self._scores[plan.request_id]
        try:
            self._run(plan)
        finally:
            KVzipScorer.scores = None
