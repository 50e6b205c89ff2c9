# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The metric `preemptions_avoided` against vLLM's real scheduler: the same step runs once more without compactions."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from vllm.engine.arg_utils import EngineArgs

from tests.property.simulated_worker import SimulatedWorker
from tests.property.test_accounting import BLOCK, POLICY, Engine, new_request, new_scheduler
from tests.support.tiny_models import build_tiny_model

# Prompt, new tokens, priority and options of each request; all arrive at once.
Traffic = list[tuple[int, int, int, dict[str, Any]]]


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Memory is taken in the very step that would not fit; below such watermarks steps hardly ever come that far."""
    return EngineArgs(
        model=str(build_tiny_model("llama", tmp_path_factory.mktemp("models"))),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=128,
        max_num_seqs=6,
        additional_config={"deltamem": {**POLICY, "high_watermark": 1.0, "low_watermark": 0.99}},
    ).create_engine_config()


class Run:
    """One engine with this traffic from the start; equal runs take equal steps."""

    def __init__(self, config: Any, blocks: int, traffic: Traffic, ahead: bool) -> None:
        self.scheduler = new_scheduler(config, blocks, caching=False, ahead=ahead)
        self._engine = Engine(self.scheduler, SimulatedWorker(BLOCK, 0), ahead)
        for number, (prompt, new, priority, extra) in enumerate(traffic):
            request = new_request(f"r{number}", [number] * prompt, new, extra)
            request.priority, request.arrival_time = priority, float(number)
            self.scheduler.add_request(request)

    def step(self) -> tuple[int, int, int]:
        """Compactions, preemptions, and how many more of them the metric says were avoided."""
        before = self._counted()
        output = self._engine.step()
        return len(output.deltamem.compactions), len(output.preempted_req_ids or ()), self._counted() - before

    def _counted(self) -> int:
        return int(self.scheduler.deltamem.totals()["counters"]["preemptions_avoided"])


def preempted_without_compactions(run: Run) -> int:
    """Preemptions of the next step of ``run`` when nothing is compacted in it."""
    run.scheduler.deltamem_policy._compact = lambda *args: None
    compactions, preempted, avoided = run.step()
    assert (compactions, avoided) == (0, 0)
    return preempted


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    modes = st.sampled_from(["pressure", "pressure", "always", "off"])
    traffic: Traffic = []
    for _ in range(draw(st.integers(3, 6))):
        mode = draw(modes)
        extra = {"deltamem_policy": "off"} if mode == "off" else {"deltamem_mode": mode}
        traffic.append((draw(st.integers(60, 320)), draw(st.integers(20, 80)), draw(st.integers(0, 2)), extra))
    return traffic


@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@given(blocks=st.integers(30, 50), traffic=traffics(), data=st.data())
def test_as_many_as_vllm_preempts_when_the_same_step_compacts_nothing(
    vllm_config, policy, ahead, blocks, traffic, data
):
    vllm_config.scheduler_config.policy = policy
    run, steps = Run(vllm_config, blocks, traffic, ahead), []
    while run.scheduler.has_requests():
        steps.append(run.step())
    compacting = [number for number, (compactions, _, _) in enumerate(steps) if compactions]
    counted = [number for number in compacting if steps[number][2]]
    assert all(not avoided or compactions for compactions, _, avoided in steps)
    event(f"avoided: {len(counted) > 0}")
    for number in {*counted[:2], *data.draw(st.permutations(compacting))[:2]} if compacting else ():
        again = Run(vllm_config, blocks, traffic, ahead)
        assert [again.step() for _ in range(number)] == steps[:number], "runs were meant to be equal"
        without = preempted_without_compactions(again)
        _, preempted, avoided = steps[number]
        event(f"several at once: {without - preempted > 1}")
        assert avoided == max(without - preempted, 0), f"step {number}: {preempted} preempted, {without} without"


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_a_crowded_pool_avoids_some(vllm_config, ahead):
    """The property is not vacuous."""
    vllm_config.scheduler_config.policy = "fcfs"
    run = Run(vllm_config, 49, [(190, 120, 0, {"deltamem_mode": "pressure"})] * 4, ahead)
    avoided = 0
    while run.scheduler.has_requests():
        avoided += run.step()[2]
    assert avoided > 0
