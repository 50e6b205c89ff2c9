# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Runs Scenarios on real vLLM and writes down everything the exactness check needs.

Each scenario has a process of its own, with the engine inside it. Importing vLLM takes ten seconds or more,
so an :class:`EngineHost` imports it once, in a process that starts no engine, and forks that for every
scenario.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_ranks import merge_ranks
from scenario import BLOCK_SIZE, Output, Preemption, Result, Scenario

RESULT_FILE = "result.json"
SUPPORT = Path(__file__).resolve().parent


class EngineHost:
    """Runs scenarios for one model runner (1 or 2), one after the other; close it at the end."""

    def __init__(self, runner: int) -> None:
        self.runner = runner
        environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1),
            # More threads only fight over the core that vLLM pins them to.
            "OMP_NUM_THREADS": "1",
        }
        path = [str(SUPPORT), *filter(None, [environment.get("PYTHONPATH")])]
        if runner == 2:
            environment["DELTAMEM_TEST_TRITON_ON_CPU"] = "1"
            path.insert(0, str(SUPPORT / "v2"))
        environment["PYTHONPATH"] = os.pathsep.join(path)
        self._process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "engine_run.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, scenario: Scenario, model: Path, directory: Path) -> Result:
        """Run ``scenario`` with the checkpoint ``model``; artefacts and the log go to ``directory``."""
        if scenario.runner != self.runner:
            raise ValueError(f"{scenario.name} needs model runner {scenario.runner}, this host has {self.runner}")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "scenario.json").write_text(scenario.to_json())
        assert self._process.stdin is not None and self._process.stdout is not None, "opened with pipes"
        self._process.stdin.write(json.dumps([str(model), str(directory)]) + "\n")
        self._process.stdin.flush()
        status = self._process.stdout.readline().strip()
        if status != "0":
            log = directory / "log.txt"
            tail = log.read_text(errors="replace").splitlines()[-60:] if log.is_file() else ["(no log)"]
            raise AssertionError(f"scenario {scenario.name}: the engine ended with {status!r}:\n" + "\n".join(tail))
        return Result.load(directory / RESULT_FILE)

    def close(self) -> None:
        # Between two scenarios it holds nothing; an orderly exit would only unload libraries for seconds.
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """The host's loop: a line in (model and directory), a fork, a line out (its exit status)."""
    # What every scenario needs, imported before the forks.
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM, SamplingParams  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        model, directory = json.loads(line)
        child = os.fork()
        if child == 0:
            _exit_after(model, Path(directory))
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")


def _exit_after(model: str, directory: Path) -> None:
    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        os.chdir(directory)
        os.environ["DELTAMEM_TEST_RECORD_DIR"] = str(directory)
        os.environ["VLLM_CACHE_ROOT"] = str(directory.parent / "vllm-cache")
        main(model, directory)
        status = 0
    except BaseException:  # A fork must never return into the host's loop; the log says what happened.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@dataclass
class Observer:
    """Wraps three scheduler methods: which step computed which token, who was compacted, who preempted.

    Attributes
    ----------
    events: "mixed_steps" and "chunks_on_compacted" are counted here; see ``Expected``.
    """

    scheduler: Any
    events: Counter[str] = field(default_factory=Counter)
    step: int = 0
    max_running: int = 0
    plans: list[tuple[int, Any]] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    token_steps: dict[str, list[int]] = field(default_factory=dict)

    def attach(self) -> None:
        from pool_checks import PoolChecks

        self._pool = PoolChecks(self.scheduler)
        for name in ("schedule", "update_from_output", "_preempt_request"):
            setattr(self, f"_stock_{name}", getattr(self.scheduler, name))
            setattr(self.scheduler, name, getattr(self, name))

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self.step += 1
        output = self._stock_schedule(*args, **kwargs)
        output.test_step = self.step
        self.max_running = max(self.max_running, len(self.scheduler.running))
        plan = getattr(output, "deltamem", None)
        self.plans += [(self.step, compaction) for compaction in (plan.compactions if plan is not None else ())]
        self._pool.check(output)
        if plan is not None:
            self._count_company(output, plan.evicted)
        return output

    def _count_company(self, output: Any, compacted: dict[str, int]) -> None:
        """Who shares the step: what a mixed batch and a chunk behind a compaction are proved by."""
        counts = output.num_scheduled_tokens
        self.events["chunks_on_compacted"] += sum(n > 1 and r in compacted for r, n in counts.items())
        decoding = [r for r, n in counts.items() if n == 1]
        reading = any(n > 1 for n in counts.values())
        either = {r in compacted for r in decoding}
        self.events["mixed_steps"] += reading and either == {True, False}

    def update_from_output(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        # Tokens in flight during a preemption still arrive, from a step before it: hence per token, not per
        # epoch.
        requests = [self.scheduler.requests.get(request_id) for request_id in output.num_scheduled_tokens]
        before = [(r, r.num_output_tokens) for r in requests if r is not None]
        result = self._stock_update_from_output(output, *args, **kwargs)
        for request, count in before:
            steps = self.token_steps.setdefault(request.request_id, [])
            steps += [output.test_step] * (request.num_output_tokens - count)
        return result

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        compacted = request.request_id in getattr(manager, "evicted", {})
        self.preemptions.append(Preemption(self.step, request.request_id, compacted))
        return self._stock__preempt_request(request, *args, **kwargs)


def engine_arguments(scenario: Scenario, model: str, directory: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "block_size": BLOCK_SIZE,
        "max_model_len": scenario.max_len,
        "max_num_batched_tokens": scenario.chunk,
        "max_num_seqs": scenario.max_seqs,
        "enable_prefix_caching": scenario.prefix_caching,
        "enforce_eager": not scenario.compiled,
        # One more: vLLM never hands out the null block.
        "num_gpu_blocks_override": scenario.blocks + 1,
        "tensor_parallel_size": scenario.tp,
        "seed": 0,
    }
    if scenario.tp > 1:
        arguments["distributed_executor_backend"] = "mp"
    if scenario.config is not None:
        config = {"calibration": "none"} | scenario.config
        if scenario.calibrated:
            from uneven_prior import write_calibration

            config["calibration"] = str(write_calibration(Path(model), directory / "calibration"))
        arguments["additional_config"] = {"deltamem": config}
        arguments["worker_cls"] = "recording_worker.RecordingWorker"
    return arguments


def main(model: str, directory: Path) -> None:
    scenario = Scenario.from_json((directory / "scenario.json").read_text())
    if scenario.tp > 1:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if scenario.asynchronous:
        from async_on_cpu import force_async_scheduling

        force_async_scheduling()
    if scenario.config is not None:
        import uneven_scorer

        uneven_scorer.register()
    if scenario.graph_rows:
        from full_graph import expect_graphs

        expect_graphs()
    if scenario.fault:
        from faults import inject

        inject(scenario.fault)
    from vllm import LLM

    llm = LLM(**engine_arguments(scenario, model, directory))
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    scheduler = core.scheduler
    observer = Observer(scheduler)
    observer.attach()
    events = _install_emulations(scenario, core)
    outputs, aborted = _serve(scenario, engine, observer)

    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    runner = "tp" if scenario.tp > 1 else type(core.model_executor.driver_worker.worker.model_runner).__module__
    Result(
        outputs=outputs,
        compactions=merge_ranks(observer.plans, directory, scenario.tp),
        preemptions=observer.preemptions,
        aborted=aborted,
        steps=observer.step,
        max_running=observer.max_running,
        free_blocks_at_end=manager.block_pool.get_num_free_blocks(),
        blocks=manager.block_pool.num_gpu_blocks - 1,
        evicted_at_end=len(getattr(manager, "evicted", {})),
        directory=str(directory),
        model=model,
        ranks=scenario.tp,
        environment={
            "scheduler": type(scheduler).__mro__[0].__name__,
            "async": str(core.vllm_config.scheduler_config.async_scheduling and core.batch_queue is not None),
            "runner": runner,
            "compilation": str(core.vllm_config.compilation_config.mode),
        },
        events=dict(observer.events + events),
    ).save(directory / RESULT_FILE)
    if scenario.tp > 1:
        core.model_executor.shutdown()


def _install_emulations(scenario: Scenario, core: Any) -> Counter[str]:
    """What runner 2 would do on a GPU only; returns the counts it will go on to fill."""
    events: Counter[str] = Counter()
    if scenario.graph_rows:
        from full_graph import FullGraph

        FullGraph(core.model_executor.driver_worker.worker.model_runner, scenario.graph_rows, events)
    if scenario.reverse_writes:
        from write_order import reverse_block_table_writes

        reverse_block_table_writes(core.model_executor.driver_worker.worker.model_runner, events)
    return events


def _serve(scenario: Scenario, engine: Any, observer: Observer) -> tuple[list[Output], list[str]]:
    from vllm import SamplingParams

    prompts = scenario.prompt_tokens(engine.model_config.get_vocab_size())
    outputs: list[Output] = []
    aborted: list[str] = []
    for round_index in range(scenario.rounds):
        names = [f"r{round_index}q{i}" for i in range(len(prompts))]
        waiting = list(range(len(prompts)))
        aborts = list(scenario.aborts) if round_index == 0 else []
        step = 0
        while waiting or engine.has_unfinished_requests():
            while waiting and step >= (len(prompts) - len(waiting)) * scenario.stagger:
                i = waiting.pop(0)
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=scenario.max_tokens[i % len(scenario.max_tokens)],
                    ignore_eos=True,
                    logprobs=0,
                    detokenize=False,
                    extra_args=scenario.options[i % len(scenario.options)] or None,
                )
                engine.add_request(names[i], {"prompt_token_ids": prompts[i]}, params)
            due = [names[i] for i, at in aborts if at == step]
            if due:
                engine.abort_request(due)
                aborted += due
            outputs += [_output(o, observer) for o in engine.step() if o.finished and o.request_id not in aborted]
            step += 1
    return outputs, aborted


def _output(finished: Any, observer: Observer) -> Output:
    completion = finished.outputs[0]
    tokens = list(completion.token_ids)
    steps = observer.token_steps[_internal_id(finished.request_id, observer.token_steps)]
    return Output(
        request=finished.request_id,
        prompt=list(finished.prompt_token_ids),
        tokens=tokens,
        logprobs=[entry[token].logprob for token, entry in zip(tokens, completion.logprobs, strict=True)],
        steps=steps,
        cached_tokens=finished.num_cached_tokens or 0,
    )


def _internal_id(name: str, known: Any) -> str:
    """The engine appends a random suffix to the ids that callers give."""
    (match,) = [key for key in known if key == name or key.startswith(name + "-")]
    return match


if __name__ == "__main__":
    serve()
