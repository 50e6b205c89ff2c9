# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which requests are compacted in a step, and the accounting of it: the scheduler's part of the policy.

Decisions themselves are pure functions of ``memory/``; here they meet vLLM's requests and blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.request import Request

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.integration.avoided import preemptions_avoided
from deltamem_vllm.integration.manager import Admission, DeltaMemManager
from deltamem_vllm.integration.policy_counts import PolicyCounts, Reason
from deltamem_vllm.memory.admission import blocks_ahead, peak_blocks, reserve_blocks
from deltamem_vllm.memory.budgets import budget_for, cdiv
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.governed import Governed
from deltamem_vllm.memory.plans import CompactionPlan, Probe
from deltamem_vllm.memory.pressure import Holding, Pool, PressureRule, relieve, spare_blocks
from deltamem_vllm.request_options import RequestOptions
from deltamem_vllm.telemetry import Telemetry

# A reserve beyond this share of the pool would cost more concurrency than it saves: compaction can still start by
# packing in place.
MAX_RESERVE_SHARE = 1 / 8


class StepWork:
    """What a step asks of the workers, in order.

    Attributes
    ----------
    compactions: already accounted for.
    probes: questions.
    """

    def __init__(self) -> None:
        self.compactions: list[CompactionPlan] = []
        self.probes: list[Probe] = []


class Policy:
    """Holds requests to what they deserve and takes memory where it is worth least.

    Parameters
    ----------
    vllm_config: of the engine.
    config: of the policy.
    manager: of the blocks.
    telemetry: counts what is done.
    max_model_len: tokens, as the scheduler knows it.

    Attributes
    ----------
    governed: request id -> state, for every live request the policy applies to.
    usable_blocks: of the pool.
    counts: what was decided.
    """

    def __init__(
        self,
        vllm_config: Any,
        config: DeltaMemConfig,
        manager: DeltaMemManager,
        telemetry: Telemetry,
        max_model_len: int,
    ) -> None:
        self.governed: dict[str, Governed] = {}
        # The null block is never handed out.
        self.usable_blocks: int = manager.block_pool.num_gpu_blocks - 1
        self._config = config
        self._vllm_config = vllm_config
        self._manager = manager
        self.counts = PolicyCounts(telemetry)
        self._max_model_len = max_model_len
        self._size: int = manager.block_size
        self._rule = PressureRule(config.high_watermark, config.low_watermark, rest_tokens=config.interval)
        self._serial = 0

    # ---- life of a request -------------------------------------------------------------------------------------

    def admit(self, request: Request) -> None:
        """A request arrived: read what it asks for and bound what it may hold."""
        params = request.sampling_params
        options = RequestOptions.from_extra_args(params.extra_args if params else None, self._config)
        budget = budget_for(options, self._config)
        if budget is None:
            return
        prompt, new = request.num_prompt_tokens, request.max_tokens
        self.governed[request.request_id] = Governed(
            budget, options.mode, options.dealing, options.scorer, options.cold
        )
        dense = cdiv(min(prompt + new, self._max_model_len), self._size)
        pressed = options.mode == "pressure"
        ahead = blocks_ahead(budget, prompt, new, self._size, self._max_model_len) if pressed else None
        if dense <= self.usable_blocks:
            # Under pressure the high watermark leaves the room for copies; with a reserve on top of it, requests would
            # be cut before they have to be.
            reserve = 0 if pressed else reserve_blocks(budget, prompt, self._size)
            reserve = min(reserve, self._reserve_limit, self.usable_blocks - dense)
            admission = Admission(max_blocks=None, reserve=reserve, ahead=ahead)
        else:
            chunk = self._vllm_config.max_in_flight_tokens
            bound = peak_blocks(budget, prompt, new, self._size, chunk, self._max_model_len)
            admission = Admission(max_blocks=min(bound, self.usable_blocks), reserve=0, ahead=ahead)
            # Cached blocks of a prompt longer than the pool could fill it before its first chunk fits.
            request.skip_reading_prefix_cache = True
        self._manager.admissions[request.request_id] = admission

    def forget(self, request_id: str) -> None:
        """A request finished or was aborted."""
        self.governed.pop(request_id, None)
        self._manager.admissions.pop(request_id, None)

    def preempted(self, request_id: str) -> None:
        """vLLM took a request's blocks: it will be computed again."""
        held = len(self._manager.req_to_blocks.get(request_id, ()))
        self.counts.preempted(request_id, request_id in self._manager.evicted, held)
        if request_id in self.governed:
            self.governed[request_id].start_over()
        # A request may not be preempted to keep a reserve that nobody is left to use.
        self._manager.reserve = 0

    # ---- one step ----------------------------------------------------------------------------------------------

    def step(self, running: Sequence[Request], waiting: Iterable[Request], free_seats: int) -> StepWork:
        """Decide and account for the compactions of the step that is about to be scheduled.

        Parameters
        ----------
        running: in vLLM's order.
        waiting: in the order in which vLLM would start them.
        free_seats: how many of them may start.
        """
        self._manager.reserve = self._reserve_wanted(running)
        free = self._manager.block_pool.get_num_free_blocks()
        work = StepWork()
        started = [r for r in running if r.request_id in self.governed and r.num_computed_tokens > 0]
        self._compact_what_is_due(started, work)
        self._relieve(running, started, waiting, free_seats, work)
        self._compact_if_short(running, started, work)
        if work.compactions:
            config = self._vllm_config.scheduler_config
            self.counts.avoided(preemptions_avoided(running, self._manager, work.compactions, free, config))
        return work

    def answers(self, curves: dict[str, UtilityCurve]) -> None:
        """Take over what workers answered to probes."""
        for request_id, curve in curves.items():
            if request_id in self.governed:
                self.governed[request_id].answer(curve)

    def _compact_what_is_due(self, started: Iterable[Request], work: StepWork) -> None:
        """Mode ``always``: hold every request whose prompt is done to what it deserves."""
        for request in started:
            state = self.governed[request.request_id]
            if state.mode != "always" or request.is_prefill_chunk:
                continue
            logical, resident = self._lengths(request)
            if state.budget.wants_curve(resident, self._size, state.curve):
                if state.wants_curve(logical, resident, self._size):
                    self._probe(request, work)
                continue
            keep = state.budget.due(logical, resident, self._size, state.curve)
            if keep is not None:
                self._compact(request, keep, work, "budget")

    def _relieve(
        self,
        running: Sequence[Request],
        started: Sequence[Request],
        waiting: Iterable[Request],
        free_seats: int,
        work: StepWork,
    ) -> None:
        """Mode ``pressure``: take memory where it is worth least, once the pool fills."""
        givers = [r for r in started if self.governed[r.request_id].mode == "pressure"]
        if not givers:
            return
        free = self._manager.block_pool.get_num_free_blocks()
        pool = Pool(self.usable_blocks, self.usable_blocks - free, self._blocks_wanted(running))
        decoding = [r for r in givers if not r.is_prefill_chunk]
        queue = list(zip(waiting, range(free_seats), strict=False))
        if not queue and pool.above(self._rule.low_watermark) <= 0:
            return
        holdings = [self._holding(r) for r in decoding]
        pool = Pool(pool.blocks, pool.used, pool.needed, self._blocks_waited_for([r for r, _ in queue], free, holdings))
        if pool.above(self._rule.low_watermark) <= 0:
            return
        # Nobody asks what cannot be taken is worth, or what is taken whatever it is worth.
        giving = {h.request_id for h in holdings if h.held > max(h.floor, h.fixed)}
        chosen = pool.above(self._rule.low_watermark) < spare_blocks(h for h in holdings if self._rule.is_rested(h))
        blind = [r for r in decoding if r.request_id in giving and self._wants_look(r, chosen)]
        unseen = any(self.governed[r.request_id].asked_at is None for r in blind)
        for request in blind:
            self._probe(request, work)
        if unseen and pool.short <= 0:
            return  # there is time for a look before anything is taken
        kept = relieve(holdings, pool, self._rule)
        freed = sum(h.held - kept[h.request_id] for h in holdings if h.request_id in kept)
        if freed < pool.short:
            # A prompt that is still being read is judged by queries that have not seen its end: only if it must be.
            kept = relieve([self._holding(r) for r in givers], pool, self._rule)
        for request in givers:
            if request.request_id in kept:
                self._compact(request, kept[request.request_id] * self._size, work, "pressure")

    def _compact_if_short(self, running: Sequence[Request], started: Sequence[Request], work: StepWork) -> None:
        """As far as this step would otherwise not fit: vLLM would preempt a request instead.

        Requests that decode come first. They wait for `interval` only to be compacted less often; a prompt
        compacted between two chunks is judged by queries that have not seen its end.
        """
        manager = self._manager
        short = self._blocks_wanted(running) + manager.reserve - manager.block_pool.get_num_free_blocks()
        for request in sorted(started, key=lambda r: (r.is_prefill_chunk, -len(manager.req_to_blocks[r.request_id]))):
            if short <= 0:
                break
            logical, resident = self._lengths(request)
            keep = self.governed[request.request_id].budget.due_when_short(logical, resident, self._size)
            if keep is None or any(plan.request_id == request.request_id for plan in work.compactions):
                continue
            free = manager.block_pool.get_num_free_blocks()
            self._compact(request, keep, work, "short")
            short -= manager.block_pool.get_num_free_blocks() - free

    # ---- the pool ----------------------------------------------------------------------------------------------

    @property
    def _reserve_limit(self) -> int:
        return int(self.usable_blocks * MAX_RESERVE_SHARE)

    def _reserve_wanted(self, running: Sequence[Request]) -> int:
        """Blocks the largest compaction still to come needs, so that it can start when the pool is full."""
        if len(running) < 2 or not self._manager.enable_caching:
            return 0  # alone, or without prefix caching, a request can always be packed in place
        pending = (
            reserve_blocks(state.budget, r.num_prompt_tokens, self._size)
            for r in running
            if (state := self.governed.get(r.request_id)) is not None
            and state.mode == "always"
            and r.request_id not in self._manager.evicted
        )
        return min(max(pending, default=0), self._reserve_limit)

    def _blocks_wanted(self, requests: Iterable[Request]) -> int:
        """Blocks the next step of these requests asks for, at most."""
        wanted, tokens_left = 0, self._vllm_config.scheduler_config.max_num_batched_tokens
        for request in requests:
            ahead = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            new = min(max(ahead, 1), tokens_left)
            tokens_left -= new
            _, resident = self._lengths(request)
            held = len(self._manager.req_to_blocks[request.request_id])
            wanted += max(cdiv(resident + new, self._size) - held, 0)
        return wanted

    def _blocks_waited_for(self, queue: Iterable[Request], free: int, holdings: Iterable[Holding]) -> int:
        """Blocks that the next waiting requests want, as far as the running ones could make room for them."""
        room = free + spare_blocks(h for h in holdings if self._rule.is_rested(h))
        wanted, ahead = 0, self._manager.ahead()
        for request in queue:
            admission = self._manager.admissions.get(request.request_id)
            blocks = cdiv(request.num_tokens, self._size)
            if admission is not None:
                if admission.ahead is not None:
                    if not self._manager.may_start(admission.ahead, ahead):
                        break
                    ahead += admission.ahead
                blocks = min(blocks, admission.max_blocks) if admission.max_blocks else blocks + admission.reserve
            if wanted + blocks > room:
                break
            wanted += blocks
        return wanted

    def _lengths(self, request: Request) -> tuple[int, int]:
        """Logical and (nominal) resident tokens."""
        logical = request.num_computed_tokens
        return logical, logical - self._manager.evicted.get(request.request_id, 0)

    def _holding(self, request: Request) -> Holding:
        logical, resident = self._lengths(request)
        held = len(self._manager.req_to_blocks[request.request_id])
        state = self.governed[request.request_id]
        return state.holding(request.request_id, held, logical, resident, self._size)

    def _wants_look(self, request: Request, chosen: bool) -> bool:
        """Whether the request should be looked at before memory is taken: always where coverage decides how much."""
        state, (logical, resident) = self.governed[request.request_id], self._lengths(request)
        coverage = state.budget.wants_curve(resident, self._size, curve=None)
        return (chosen or coverage) and state.wants_look(logical, resident, self._size)

    # ---- orders to the workers ---------------------------------------------------------------------------------

    def _probe(self, request: Request, work: StepWork) -> None:
        logical, resident = self._lengths(request)
        if resident < self._size:
            return
        source = [b.block_id for b in self._manager.req_to_blocks[request.request_id]]
        self._ask(request.request_id, source, resident, logical, work)

    def _ask(
        self, request_id: str, source: Sequence[int], resident: int, logical: int, work: StepWork, last: bool = False
    ) -> None:
        """Ask what a request is worth; ``last``: before the compaction of this step."""
        state = self.governed[request_id]
        state.ask(logical)
        self.counts.probed()
        work.probes.append(
            Probe(
                request_id=request_id,
                source_blocks=tuple(source),
                resident_len=resident,
                logical_len=logical,
                sink_tokens=state.budget.sink_tokens,
                recent_tokens=state.budget.recent_tokens,
                scorer=state.scorer,
                dealing=state.dealing,
                cold=state.cold,
                compacted_next=last,
            )
        )

    def _compact(self, request: Request, keep: int, work: StepWork, reason: Reason) -> None:
        """Do the accounting of one compaction: all of it, or nothing and a counted reason."""
        manager, request_id = self._manager, request.request_id
        state = self.governed[request_id]
        logical, resident = self._lengths(request)
        blocks = cdiv(keep, self._size)
        if manager.owned_share(request_id) <= blocks:
            # Shared blocks are freed by their last owner: private survivors would take more than the request's part.
            return self._skip(request_id, logical, "shared_prefix")
        in_place = not manager.can_copy(keep)
        if in_place and not manager.can_pack(request_id):
            return self._skip(request_id, logical, "no_free_blocks")
        source, target = manager.compact(request_id, keep, logical - keep, in_place)
        serial = 0
        if state.dealing != "equal":
            assert keep == blocks * self._size, "pages are dealt in whole blocks"
            self._serial += 1
            serial = manager.dealt[request_id] = self._serial
        if state.mode == "pressure" and state.curve is None and state.wants_look(logical, resident, self._size):
            # The worker rates all tokens anyway: what the survivors are worth costs little more now, and much later.
            self._ask(request_id, source, resident, logical, work, last=True)
        state.compacted(logical, blocks, resident // self._size)
        work.compactions.append(
            CompactionPlan(
                request_id=request_id,
                source_blocks=tuple(source),
                target_blocks=tuple(target),
                blocks_after=tuple(target),
                resident_before=resident,
                keep=keep,
                logical_len=logical,
                evicted_before=logical - resident,
                evicted_after=logical - keep,
                sink_tokens=state.budget.sink_tokens,
                recent_tokens=state.budget.recent_tokens,
                scorer=state.scorer,
                dealing=state.dealing,
                serial=serial,
                in_place=in_place,
                cold=state.cold,
            )
        )
        self.counts.compacted(work.compactions[-1], reason)

    def _skip(self, request_id: str, logical: int, reason: str) -> None:
        self.counts.skipped(request_id, reason, logical)
        self.governed[request_id].skipped(logical)
