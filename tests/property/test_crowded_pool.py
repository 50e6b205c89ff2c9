# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Mode ``pressure`` on vLLM's real scheduler: a pool that stays crowded is relieved by few compactions."""

from __future__ import annotations

import pytest

from deltamem_vllm.integration.manager import DeltaMemManager
from tests.property.simulated_worker import SimulatedWorker
from tests.property.test_accounting import BLOCK, Engine, new_request, new_scheduler, plans_of, vllm_config

__all__ = ["vllm_config"]  # a fixture

KEEP = "deltamem_keep_ratio"
PRESSURE = {"deltamem_mode": "pressure", KEEP: 0.1}


def test_nobody_is_compacted_for_a_single_block_again_and_again(vllm_config):
    scheduler = new_scheduler(vllm_config, 61, caching=False)
    for i in range(6):  # 18 blocks each, and 25 more written: 6 can run, but two and a half would fit whole
        scheduler.add_request(new_request(f"r{i}", [i] * 288, 400, PRESSURE))
    outputs = Engine(scheduler, SimulatedWorker(BLOCK, 0)).run_to_the_end()
    plans = plans_of(outputs)
    assert not any(output.preempted_req_ids for output in outputs)
    freed = [len(plan.source_blocks) - len(plan.target_blocks) for plan in plans]
    held = [len(plan.source_blocks) for plan in plans]
    assert sum(freed) >= 6 * 43 - 60 - 43, "the pool was meant to be crowded"
    # In the end every request holds about 9 blocks: a quarter of them at a time.
    assert sum(freed) / len(plans) > 2
    assert sum(gives >= holds / 4 for gives, holds in zip(freed, held, strict=True)) > 0.8 * len(plans)


def test_where_all_must_be_taken_nobody_is_looked_at_first(vllm_config):
    """The queue is longer than what can be spared: the compaction itself answers what the survivors are worth."""
    scheduler = new_scheduler(vllm_config, 49, caching=False)
    for i in range(6):
        scheduler.add_request(new_request(f"r{i}", [i] * 320, 30, PRESSURE))
    outputs = Engine(scheduler, SimulatedWorker(BLOCK, 0)).run_to_the_end()
    first = next(output for output in outputs if output.deltamem.compactions)
    assert [probe.compacted_next for probe in first.deltamem.probes] == [True] * len(first.deltamem.compactions)
    assert {probe.request_id for probe in first.deltamem.probes} == {p.request_id for p in first.deltamem.compactions}
    earlier = outputs[: outputs.index(first)]
    assert not any(output.deltamem.probes for output in earlier)


def _serve_many_short_prompts(vllm_config, caching: bool):
    """Small when they start, and each in the end more than its part of the pool even at its least."""
    scheduler = new_scheduler(vllm_config, 25, caching)
    for i in range(12):  # 18 blocks each in the end, of which 5 stay at least: 4 can run, and 6 seats are free
        scheduler.add_request(new_request(f"r{i}", [i] * 48, 240, PRESSURE | {KEEP: 0.3}))
    outputs = Engine(scheduler, SimulatedWorker(BLOCK, 0)).run_to_the_end()
    preempted = sum(len(output.preempted_req_ids or ()) for output in outputs)
    return preempted, max(len(output.num_scheduled_tokens) for output in outputs), plans_of(outputs)


@pytest.mark.parametrize("caching", [True, False])
def test_no_more_requests_start_than_can_run_to_their_end(vllm_config, caching):
    preempted, running, plans = _serve_many_short_prompts(vllm_config, caching)
    assert preempted == 0
    assert running == 4
    assert plans, "the pool was meant to be crowded"


def test_without_looking_ahead_they_are_preempted(vllm_config, monkeypatch):
    with_it = _serve_many_short_prompts(vllm_config, caching=True)
    monkeypatch.setattr(DeltaMemManager, "may_start", lambda self, ahead, running, shared=0: True)
    without = _serve_many_short_prompts(vllm_config, caching=True)
    assert without[0] > 0 and without[1] > with_it[1] and len(without[2]) > len(with_it[2])


def test_a_request_that_will_need_more_than_is_left_waits_alone_it_starts(vllm_config):
    """Its least alone is more than the pool leaves beside another; it comes when the other is done."""
    scheduler = new_scheduler(vllm_config, 31, caching=True)
    for name in ("first", "second"):
        scheduler.add_request(new_request(name, [1 if name == "first" else 2] * 96, 160, PRESSURE | {KEEP: 0.95}))
    outputs = Engine(scheduler, SimulatedWorker(BLOCK, 0)).run_to_the_end()
    assert max(len(output.num_scheduled_tokens) for output in outputs) == 1
    assert not any(output.preempted_req_ids for output in outputs)


def test_requests_that_share_their_prompt_are_not_kept_waiting_for_room_they_do_not_need(vllm_config):
    """Five at their least would be more than the pool, but they share nearly all they hold."""
    scheduler = new_scheduler(vllm_config, 31, caching=True)
    engine = Engine(scheduler, SimulatedWorker(BLOCK, 0))
    for i in range(5):
        scheduler.add_request(new_request(f"r{i}", [7] * 320, 12, PRESSURE | {KEEP: 0.9}))
        if i == 0:
            for _ in range(6):  # its prompt is read before the others arrive
                engine.step()
    outputs = engine.run_to_the_end()
    assert max(len(output.num_scheduled_tokens) for output in outputs) == 5
    assert not any(output.preempted_req_ids or output.deltamem.compactions for output in outputs)
