# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Mode ``pressure`` on vLLM's real scheduler: a pool that stays crowded is relieved by few compactions."""

from __future__ import annotations

from tests.property.simulated_worker import SimulatedWorker
from tests.property.test_accounting import BLOCK, Engine, new_request, new_scheduler, plans_of, vllm_config

__all__ = ["vllm_config"]  # a fixture

PRESSURE = {"deltamem_mode": "pressure", "deltamem_keep_ratio": 0.1}


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
