# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Carries out a CompactionPlan on one worker: score, choose, copy; layer by layer where all heads keep the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor

from deltamem_vllm.dealing.cold_pages import ColdChoice
from deltamem_vllm.dealing.dealer import Dealer
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.plans import CompactionPlan, Probe
from deltamem_vllm.memory.tiers import ColdHeld
from deltamem_vllm.ops.pages import PageMover, take_tokens
from deltamem_vllm.scoring.base import Scorer, ScoreView, select_survivors
from deltamem_vllm.scoring.window import ObservationWindow


class Compactor:
    """Chooses and moves the survivors of this rank's kv heads.

    Parameters
    ----------
    caches: each layer's KV cache, ``[num_blocks, H_kv, block_size, 2 * D]``, model order.
    scales: each layer's factor on q . k.
    mover: reads and writes pages of that layout.
    scorers: rate the resident tokens; a plan names its own.
    window: recorded queries; None if no scorer needs any.
    seed: of the policy.
    dealer: carries out the plans whose pages are dealt; None where all plans are ``equal``.

    Attributes
    ----------
    on_compaction: called with the plan and the survivors: for each layer and kv head the resident indices it kept,
        ascending, [n] int64; of dealt pages, those that stay in hot ones. For tests and instruments.
    on_coded: called after it with the plan and what became or stayed cold, where pages can be.
    """

    def __init__(
        self,
        caches: Sequence[Tensor],
        scales: Sequence[float],
        mover: PageMover,
        scorers: Mapping[str, Scorer],
        window: ObservationWindow | None,
        seed: int,
        dealer: Dealer | None = None,
    ) -> None:
        self._caches = caches
        self._scales = scales
        self._mover = mover
        self.scorers = scorers
        self._window = window
        self._seed = seed
        self._dealer = dealer
        self.on_compaction: Callable[[CompactionPlan, list[list[Tensor]]], None] | None = None
        self.on_coded: Callable[[CompactionPlan, ColdChoice], None] | None = None
        self._timings = {"scoring_us": 0, "compaction_us": 0}
        self._cold: dict[str, ColdHeld] = {}

    @torch.inference_mode()
    def run(self, plan: CompactionPlan) -> None:
        """Copy the survivors of one request into the plan's target blocks."""
        began = time.perf_counter()
        scorer = self.scorers[plan.scorer]
        carry_out = self._run_equal if plan.dealing == "equal" else self._run_dealt
        scoring = carry_out(plan, scorer)
        # On a GPU this is the time to issue the work; the device does it before the step's forward pass.
        self._timings["scoring_us"] += round(scoring * 1e6)
        self._timings["compaction_us"] += round((time.perf_counter() - began) * 1e6)

    def forget(self, dealt: Container[str]) -> None:
        """Drop what is known of requests whose pages are no longer dealt; before the step's plans."""
        if self._dealer is not None:
            self._dealer.forget(dealt)

    def probe(self, probe: Probe) -> UtilityCurve:
        """What a request's tokens are worth, for the scheduler."""
        assert self._dealer is not None, "the worker makes one where pages are dealt"
        began = time.perf_counter()
        answer = self._dealer.probe(probe, self.scorers[probe.scorer])
        self._timings["scoring_us"] += round((time.perf_counter() - began) * 1e6)
        return answer

    def _run_dealt(self, plan: CompactionPlan, scorer: Scorer) -> float:
        assert self._dealer is not None, "the worker makes one where pages are dealt"
        before = self._dealer.scoring_seconds
        moved = self._dealer.run(plan, scorer)
        if self.on_compaction is not None:
            self.on_compaction(plan, [[head.nonzero().squeeze(1) for head in layer] for layer in moved.hot])
        if moved.cold is not None:
            self._cold[plan.request_id] = self._dealer.tables.cold_held(plan.request_id)
            if self.on_coded is not None:
                self.on_coded(plan, moved.cold)
        return self._dealer.scoring_seconds - before

    def _run_equal(self, plan: CompactionPlan, scorer: Scorer) -> float:
        """All tokens of a layer are read before any is written, so in-place plans need no special case."""
        scoring = 0.0
        device = self._caches[0].device
        source = _ids(plan.source_blocks, device)
        target = _ids(plan.target_blocks, device)
        rows = None
        if scorer.needs_queries:
            assert self._window is not None, "the worker makes one for such scorers"
            rows = self._window.rows(plan.request_id)
        survivors: list[list[Tensor]] = []
        for layer, cache in enumerate(self._caches):
            keys, values = self._mover.read(cache, source, plan.resident_before)
            score_began = time.perf_counter()
            index = self._choose(scorer, plan, layer, keys, values, rows)
            scoring += time.perf_counter() - score_began
            self._mover.write(cache, target, take_tokens(keys, index), take_tokens(values, index))
            if self.on_compaction is not None:
                survivors.append(list(index))
        if self.on_compaction is not None:
            self.on_compaction(plan, survivors)
        return scoring

    def take_timings(self) -> dict[str, int]:
        """Microseconds spent since the last call; compaction includes scoring."""
        taken, self._timings = self._timings, dict.fromkeys(self._timings, 0)
        return taken

    def take_cold(self) -> dict[str, ColdHeld]:
        """What requests that were compacted since the last call hold in cold pages."""
        taken, self._cold = self._cold, {}
        return taken

    def _choose(
        self, scorer: Scorer, plan: CompactionPlan, layer: int, keys: Tensor, values: Tensor, rows: Tensor | None
    ) -> Tensor:
        queries = None
        if rows is not None and self._window is not None:
            queries = self._window.rings[layer].index_select(0, rows).transpose(0, 1)
        view = ScoreView(
            keys=keys, values=values, queries=queries, scale=self._scales[layer], layer=layer, seed=self._seed
        )
        return select_survivors(scorer.score(view), plan.keep, plan.sink_tokens, plan.recent_tokens)


def _ids(blocks: Sequence[int], device: torch.device) -> Tensor:
    host = torch.tensor(blocks, dtype=torch.int64)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
