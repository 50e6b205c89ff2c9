# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The engine of `deltamem eval`: a child process that force-feeds texts to vLLM under one policy after another.

vLLM's engine runs in this process and is stepped by hand, so that scripts reach the sampler (`replay`) and the blocks
that a request holds can be read off the scheduler between two steps. One JSON object a line:

    in   {"engine_args": {...}}                                       first line
    out  {"ready": {...}}
    in   {"samples": [[request, ...], ...], "concurrency": n}         requests as in evaluation.eval.engine.Request
    out  {"cell": {...}}  for each request, {"done": count} at the end

The requests of one sample share their prompt. They run one after another: the next one finds the prompt in the
prefix cache, and a compaction of blocks that several running requests share would be skipped. Samples run side by side.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm import __version__ as vllm_version
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from deltamem_vllm.evaluation.eval.grid import KVZIP
from deltamem_vllm.evaluation.eval.kvzip import register
from deltamem_vllm.integration.eval_kvzip import KVzipReference
from deltamem_vllm.integration.ledger import verify_ledger
from deltamem_vllm.integration.ledger_instruments import INSTRUMENTS
from deltamem_vllm.integration.parent_pipe import ParentPipe
from deltamem_vllm.integration.replay import EXTRA_ARG, Replay, Script
from deltamem_vllm.request_options import SCORER

_EMPTY_CELL: dict[str, Any] = {
    "skipped": True,
    **{name: [] for name in ("positions", "gold", "argmax", "kl", "written")},
    **dict.fromkeys(("cached_tokens", "compactions", "resident_bytes", "resident_tokens", "logical_tokens"), 0),
    "seconds": 0.0,
}


@dataclass
class _Running:
    """A request in flight and what was seen of it so far."""

    name: str
    request: dict[str, Any]
    script: Script
    sample: int
    internal_id: str
    began: float
    evicted: int = 0
    compactions: int = 0
    held: dict[str, int] | None = None


class Session:
    """A vLLM engine in this process and the samples it is working on."""

    def __init__(self, engine_args: dict[str, Any]) -> None:
        verify_ledger(INSTRUMENTS)
        register()
        arguments = EngineArgs(
            **engine_args, logits_processors=[Replay], async_scheduling=False, disable_log_stats=True
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        core = self._engine.engine_core.engine_core  # type: ignore[attr-defined]  # the engine runs in this process
        self._scheduler = core.scheduler
        (self._manager,) = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        (group,) = self._scheduler.kv_cache_config.kv_cache_groups
        self._block_bytes = len(group.layer_names) * group.kv_cache_spec.page_size_bytes
        self._count = 0
        self._running: dict[str, _Running] = {}
        self._schedule = self._scheduler.schedule
        self._scheduler.schedule = self._watched_schedule
        config = core.vllm_config
        worker = core.model_executor.driver_worker.worker
        self._kvzip: KVzipReference | None = None
        if getattr(worker, "deltamem", None) is not None and KVZIP in worker.deltamem.compactor.scorers:
            device = config.device_config.device_type
            at_work = config.scheduler_config.max_num_seqs
            self._kvzip = KVzipReference(worker, engine_args["model"], device, keep=at_work)
        model, parallel = config.model_config, config.parallel_config
        self.facts = {
            "vllm": vllm_version,
            "torch": torch.__version__,
            "device": config.device_config.device_type,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_cache_dtype": config.cache_config.cache_dtype,
            "layers": model.get_num_layers(parallel),
            "kv_heads": model.get_num_kv_heads(parallel),
            "head_size": model.get_head_size(),
            "block_size": self._manager.block_size,
            "block_bytes": self._block_bytes,
            "pool_blocks": config.cache_config.num_gpu_blocks,
            "vocabulary": model.get_vocab_size(),
        }

    def run(self, samples: list[list[dict[str, Any]]], concurrency: int) -> Iterator[dict[str, Any]]:
        """Serve all requests; yields a cell for each when it is finished."""
        waiting = deque(range(len(samples)))
        left = [deque(requests) for requests in samples]
        references: list[dict[str, dict[str, Any]]] = [{} for _ in samples]
        while waiting or self._running:
            while waiting and len(self._running) < concurrency:
                sample = waiting.popleft()
                yield from self._skip(left[sample], references[sample])
                if not left[sample]:
                    continue
                self._start(sample, left[sample].popleft(), references[sample])
            for output in self._engine.step():
                if not output.finished:
                    continue
                done = self._running.pop(output.request_id)
                del Replay.scripts[done.name]
                if self._kvzip is not None:
                    self._kvzip.forget(done.internal_id)
                yield self._cell(done, output, references[done.sample])
                yield from self._skip(left[done.sample], references[done.sample])
                if left[done.sample]:
                    self._start(done.sample, left[done.sample].popleft(), references[done.sample])

    @staticmethod
    def _skip(requests: deque[dict[str, Any]], references: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Leave out the next requests as long as the full cache failed at them."""
        while requests and requests[0]["only_if_solved"]:
            known = _reference(requests[0], references)
            if known["solved"]:
                return
            yield _EMPTY_CELL | {"key": requests.popleft()["key"]}

    def _start(self, sample: int, request: dict[str, Any], references: dict[str, dict[str, Any]]) -> None:
        name = f"e{self._count}"
        self._count += 1
        forced, reference = request["forced"], None
        if not request["is_reference"]:
            known = _reference(request, references)
            forced, reference = known["forced"], known["rows"]
        count = request["generate"] if forced is None else len(forced)
        measured = request["measured"] or list(range(1, count))
        script = Script(forced, measured, reference, keep_rows=request["is_reference"])
        Replay.scripts[name] = script
        params = SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            extra_args={EXTRA_ARG: name, **request["options"]},
        )
        self._engine.add_request(name, {"prompt_token_ids": request["prompt"]}, params)
        # The engine appends a random suffix to the ids that callers give.
        (internal,) = [known for known in self._scheduler.requests if known.startswith(f"{name}-") or known == name]
        if request["options"].get(SCORER) == KVZIP:
            assert self._kvzip is not None, "the grid names every scorer to the engine that serves it"
            self._kvzip.prepare(internal, request["prompt"])
        self._running[name] = _Running(name, request, script, sample, internal, time.perf_counter())

    def _watched_schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Note what each request holds in the step that computes its first measured token."""
        output = self._schedule(*args, **kwargs)
        all_evicted = getattr(self._manager, "evicted", {})
        for one in self._running.values():
            evicted = all_evicted.get(one.internal_id, 0)
            one.compactions += evicted > one.evicted
            one.evicted = evicted
            request = self._scheduler.requests[one.internal_id]
            if request.num_output_tokens == one.script.measured[0]:
                # The scheduler has counted this step's token in already.
                one.held = {
                    "resident_bytes": len(self._manager.req_to_blocks[one.internal_id]) * self._block_bytes,
                    "resident_tokens": request.num_computed_tokens - evicted,
                    "logical_tokens": request.num_computed_tokens,
                }
        return output

    def _cell(self, done: _Running, output: Any, references: dict[str, dict[str, Any]]) -> dict[str, Any]:
        script, request = done.script, done.request
        if done.held is None:
            raise RuntimeError(f"{request['key']}: finished before its first measured token was seen")
        if request["is_reference"]:
            rows = torch.stack([script.rows[position] for position in script.measured])
            forced = list(output.outputs[0].token_ids)
            solved = all(script.argmax[position] == forced[position] for position in script.measured)
            references[request["reference"]] = {"forced": forced, "rows": rows, "solved": solved}
            if request["reference_file"]:
                np.savez(request["reference_file"], forced=np.array(forced), rows=rows.numpy(), solved=solved)
        return {
            "key": request["key"],
            "skipped": False,
            "positions": list(script.measured),
            "gold": [script.gold[p] for p in script.measured],
            "argmax": [script.argmax[p] for p in script.measured],
            "kl": [script.kl.get(p, 0.0) for p in script.measured],
            "written": list(output.outputs[0].token_ids),
            "cached_tokens": output.num_cached_tokens or 0,
            "compactions": done.compactions,
            "seconds": round(time.perf_counter() - done.began, 3),
            **done.held,
        }


def _reference(request: dict[str, Any], references: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the full cache did with the same text: known from this engine, or left in a file by another one."""
    known = references.get(request["reference"])
    if known is None:
        with np.load(Path(request["reference_file"])) as stored:
            known = {
                "forced": stored["forced"].tolist(),
                "rows": torch.from_numpy(stored["rows"]),
                "solved": bool(stored["solved"]),
            }
        references[request["reference"]] = known
    return known


def main() -> None:
    """Serve the parent process until it closes the pipe."""
    pipe = ParentPipe()
    session = Session(pipe.read()["engine_args"])
    pipe.answer("ready", session.facts)
    while (command := pipe.read()) is not None:
        count = 0
        for cell in session.run(command["samples"], command["concurrency"]):
            pipe.answer("cell", cell)
            count += 1
        pipe.answer("done", count)


if __name__ == "__main__":
    main()
