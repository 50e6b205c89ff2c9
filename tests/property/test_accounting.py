# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Random traffic against vLLM's real scheduler with compaction: no block lost, owned twice or written while shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.property.simulated_worker import PAIRS, RATIO, SimulatedWorker
from tests.support.pool_checks import PoolChecks
from tests.support.tiny_models import build_tiny_model

BLOCK = 16
POLICY = {
    "mode": "always",
    "dealing": "global",
    "cold_bits": 4,
    "keep_ratio": 0.2,
    "min_tokens": 40,
    "sink_tokens": 2,
    "recent_tokens": 8,
    "window": 4,
    "interval": 16,
}


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = build_tiny_model("llama", tmp_path_factory.mktemp("models"))
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=64,
        max_num_seqs=6,
        additional_config={"deltamem": POLICY},
    ).create_engine_config()


def new_scheduler(config: Any, blocks: int, caching: bool, ahead: bool = False) -> Any:
    from deltamem_vllm.integration.scheduler import DeltaMemAsyncScheduler, DeltaMemScheduler
    from deltamem_vllm.integration.spec import DeltaMemSpec

    init_none_hash(sha256)
    config.scheduler_config.async_scheduling = ahead
    config.cache_config.enable_prefix_caching = caching
    config.cache_config.num_gpu_blocks = blocks
    config.cache_config.block_size = BLOCK
    plain = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    group = KVCacheGroupSpec([f"layer.{i}" for i in range(3)], DeltaMemSpec.of(plain))
    return (DeltaMemAsyncScheduler if ahead else DeltaMemScheduler)(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[group]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


def new_request(name: str, prompt: list[int], new_tokens: int, extra: dict[str, Any] | None) -> Request:
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, extra_args=extra)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, prompt, params, None, block_hasher=hasher)


def block_tables(scheduler: Any) -> dict[str, list[int]]:
    held = scheduler.deltamem_manager.req_to_blocks
    return {request_id: [block.block_id for block in blocks] for request_id, blocks in held.items()}


class Engine:
    """Steps a scheduler and a worker; ``ahead``: the output of a step is known only after the next is scheduled."""

    def __init__(self, scheduler: Any, worker: SimulatedWorker, ahead: bool = False) -> None:
        self.scheduler, self.worker = scheduler, worker
        self.most_dealt_pages = 0
        self._pool = PoolChecks(scheduler)
        self._depth = 1 if ahead else 0
        self._in_flight: list[tuple[Any, Any]] = []

    def step(self) -> Any:
        output = self.scheduler.schedule()
        self._pool.check(output)
        self._in_flight.append((output, self.worker.execute(output, self.scheduler.requests)))
        self.most_dealt_pages = max(self.most_dealt_pages, self.worker.check_pages(block_tables(self.scheduler)))
        while len(self._in_flight) > self._depth:
            self.scheduler.update_from_output(*self._in_flight.pop(0))
        return output

    def run_to_the_end(self, limit: int = 3000) -> list[Any]:
        outputs = []
        for _ in range(limit):
            if not self.scheduler.has_requests():
                return outputs
            outputs.append(self.step())
        raise AssertionError(f"requests left after {limit} steps: {sorted(self.scheduler.requests)}")


@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@given(data=st.data(), caching=st.booleans(), blocks=st.integers(30, 60), seed=st.integers(0, 2**16))
def test_random_traffic_keeps_the_books(vllm_config, ahead, data, caching, blocks, seed):
    scheduler = new_scheduler(vllm_config, blocks, caching, ahead)
    engine = Engine(scheduler, SimulatedWorker(BLOCK, seed), ahead)
    usable = (blocks - 1) * BLOCK
    names = iter(range(10_000))
    for _ in range(data.draw(st.integers(5, 60), label="steps")):
        action = data.draw(st.sampled_from(["step", "step", "step", "submit", "submit", "abort", "reset"]))
        if action == "submit":
            # Few distinct prefixes, so that requests share blocks and find each other's cache entries.
            prefix = [data.draw(st.integers(0, 2), label="prefix")] * data.draw(st.integers(0, 8)) * BLOCK
            length = data.draw(st.integers(1, min(usable + 200, 950)), label="length")
            prompt = (prefix + list(range(length)))[: max(length, 1)]
            off = data.draw(st.booleans()) and len(prompt) + 60 < usable
            extra: dict[str, Any] = {"deltamem_policy": "off"}
            if not off:
                dealing = data.draw(st.sampled_from(["global", "equal"]), label="dealing")
                extra = {
                    "deltamem_keep_ratio": data.draw(st.sampled_from([0.1, 0.3])),
                    "deltamem_dealing": dealing,
                    "deltamem_mode": data.draw(st.sampled_from(["always", "pressure"]), label="mode"),
                }
                if dealing == "global" and data.draw(st.booleans(), label="hot only"):
                    extra["deltamem_cold"] = "off"
                if dealing == "global" and data.draw(st.booleans(), label="coverage"):
                    extra["deltamem_coverage"] = 0.7
            new = data.draw(st.integers(1, 60), label="new tokens")
            scheduler.add_request(new_request(f"r{next(names)}", prompt, new, extra))
        elif action == "abort":
            number, alive = data.draw(st.integers(0, 63), label="victim"), sorted(scheduler.requests)
            if alive:
                scheduler.finish_requests(alive[number % len(alive)], RequestStatus.FINISHED_ABORTED)
        elif action == "reset":
            scheduler.reset_prefix_cache()
        else:
            engine.step()
    engine.run_to_the_end()
    event(f"compacted: {scheduler.deltamem.totals()['counters']['compactions'] > 0}")
    event(f"dealt: {engine.most_dealt_pages > 0}")
    event(f"cold: {engine.worker.most_cold_pages > 0}")
    manager = scheduler.deltamem_manager
    assert (
        manager.evicted == {}
        and manager.dealt == {}
        and manager.cold == {}
        and manager.admissions == {}
        and scheduler.deltamem_policy.governed == {}
    )
    assert manager.block_pool.get_num_free_blocks() == blocks - 1, "the pool is not whole after all requests ended"


def plans_of(outputs: list[Any]) -> list[Any]:
    return [plan for output in outputs for plan in output.deltamem.compactions]


@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
def test_a_prompt_longer_than_the_pool_is_served(vllm_config, caching):
    scheduler = new_scheduler(vllm_config, 24, caching)  # 23 usable blocks hold 368 tokens
    scheduler.add_request(new_request("long", list(range(700)), 30, None))
    plans = plans_of(Engine(scheduler, SimulatedWorker(BLOCK, 0)).run_to_the_end())
    assert any(plan.logical_len < 700 for plan in plans), "no compaction between prompt chunks"


@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "cached"])
def test_a_full_pool_is_packed_in_place(vllm_config, caching):
    scheduler = new_scheduler(vllm_config, 21, caching)
    scheduler.add_request(new_request("full", list(range(320)), 4, None))  # the whole pool
    plans = plans_of(Engine(scheduler, SimulatedWorker(BLOCK, 0)).run_to_the_end())
    assert [plan.in_place for plan in plans] == [True]


def test_a_reserve_lets_a_compaction_start_out_of_place(vllm_config):
    scheduler = new_scheduler(vllm_config, 41, caching=True)
    scheduler.add_request(new_request("first", list(range(300)), 40, None))
    scheduler.add_request(new_request("second", list(range(500, 780)), 40, None))
    plans = plans_of(Engine(scheduler, SimulatedWorker(BLOCK, 0)).run_to_the_end())
    assert len({plan.request_id for plan in plans}) == 2
    assert not any(plan.in_place for plan in plans)


def test_blocks_shared_by_two_requests_are_copied_not_packed(vllm_config):
    scheduler = new_scheduler(vllm_config, 60, caching=True)
    engine = Engine(scheduler, SimulatedWorker(BLOCK, 0))
    prompt = list(range(300))
    for name in ("first", "second"):
        scheduler.add_request(new_request(name, prompt, 40, None))
    plans = plans_of(engine.run_to_the_end())
    assert {plan.request_id for plan in plans} == {"first", "second"}
    shared = set(plans[0].source_blocks) & set(plans[1].source_blocks)
    assert shared, "the prompts were meant to share cached blocks"
    assert not plans[0].in_place


def test_a_widely_shared_prompt_is_left_alone_and_counted(vllm_config):
    """Six requests on one prompt: six private copies would take more blocks than the one shared prompt."""
    scheduler = new_scheduler(vllm_config, 60, caching=True)
    engine = Engine(scheduler, SimulatedWorker(BLOCK, 0))
    extra = {"deltamem_keep_ratio": 0.3}
    scheduler.add_request(new_request("r0", list(range(320)), 3, extra))
    for _ in range(5):
        engine.step()  # the prompt is in the cache before the others arrive
    for i in range(1, 6):
        scheduler.add_request(new_request(f"r{i}", list(range(320)), 3, extra))
    engine.run_to_the_end()
    assert scheduler.deltamem.totals()["counters"]["compactions_skipped"]["shared_prefix"] > 0


def change_equal(plan: Any, step: Any) -> None:
    object.__setattr__(plan, "blocks_after", (plan.blocks_after[-1] + 1, *plan.blocks_after[1:]))


def change_dealt(plan: Any, step: Any) -> None:
    object.__setattr__(plan, "target_blocks", (plan.source_blocks[-1] + 20, *plan.target_blocks[1:]))


def change_serial(plan: Any, step: Any) -> None:
    object.__setattr__(step, "dealt", {plan.request_id: plan.serial - 1})


@pytest.mark.parametrize(
    ("dealing", "change", "message"),
    [
        ("equal", change_equal, "not its own"),
        ("global", change_dealt, "other pages than those of its blocks"),
        ("global", change_serial, "disagree about the last compaction"),
    ],
)
def test_the_simulated_worker_sees_a_wrong_plan(vllm_config, dealing, change, message):
    """The controls: the checks fail when one block or serial of a plan is wrong."""
    scheduler, worker = new_scheduler(vllm_config, 60, caching=False), SimulatedWorker(BLOCK, 0)
    scheduler.add_request(new_request("r", list(range(300)), 8, {"deltamem_dealing": dealing}))
    with pytest.raises(AssertionError, match=message):
        for _ in range(20):
            output = scheduler.schedule()
            for plan in output.deltamem.compactions:
                change(plan, output.deltamem)
            scheduler.update_from_output(output, worker.execute(output, scheduler.requests))
            worker.check_pages(block_tables(scheduler))


@pytest.mark.parametrize("cold", [False, True], ids=["two hot", "hot and cold"])
def test_the_simulated_worker_sees_a_page_dealt_twice(vllm_config, cold):
    scheduler, worker = new_scheduler(vllm_config, 60, caching=False), SimulatedWorker(BLOCK, 0)
    deal_pages = worker.deal_pages

    def twice(plan: Any, counts: list[int]) -> list[list[tuple[int, int]]]:
        pages = deal_pages(plan, counts)
        second = next(own for own in pages[PAIRS:] if own) if cold else pages[1]
        pages[0][-1] = second[-1]
        return pages

    worker.deal_pages = twice  # type: ignore[method-assign]
    scheduler.add_request(new_request("r", list(range(300)), 8, {"deltamem_cold": "on" if cold else "off"}))
    with pytest.raises(AssertionError, match="tokens that are not its own"):
        Engine(scheduler, worker).run_to_the_end()


def test_cold_pages_outlive_compactions_and_the_scheduler_knows_of_them(vllm_config):
    scheduler, worker = new_scheduler(vllm_config, 60, caching=False), SimulatedWorker(BLOCK, 0)
    engine = Engine(scheduler, worker)
    scheduler.add_request(new_request("r", list(range(500)), 300, None))
    seen, plans = set(), 0
    while scheduler.has_requests():
        plans += len(engine.step().deltamem.compactions)
        if "r" in scheduler.deltamem_manager.cold:
            held = scheduler.deltamem_manager.cold["r"]
            seen.add(held)
            assert held.blocks * PAIRS == round(held.blocks * PAIRS) > 0
            assert held.blocks <= held.tokens <= held.blocks * RATIO * BLOCK
    assert plans > 3 and len(seen) > 1 and worker.most_cold_pages > 0
