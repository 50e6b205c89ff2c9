# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Runs a grid: makes samples, hands them to engines in batches, writes a row for each cell as it comes.

Several workers run side by side, each with engines of its own. An engine on a CPU uses one core: two of them do more
than one with two cores.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.evaluation.eval.drawing import Drawing
from deltamem_vllm.evaluation.eval.encode import Encoded, Encoder, Setting, computed_after_hit
from deltamem_vllm.evaluation.eval.engine import Cell, Engine
from deltamem_vllm.evaluation.eval.grid import FULL, Grid
from deltamem_vllm.evaluation.eval.plan import (
    EngineSpec,
    Work,
    engine_args,
    engine_specs,
    make_work,
    planned_keys,
    requests_of,
)
from deltamem_vllm.evaluation.eval.rows import make_row, skipped_row
from deltamem_vllm.evaluation.eval.tables import CONDITIONS
from deltamem_vllm.evaluation.machine import command_line
from deltamem_vllm.evaluation.results import Results, run_id

Say = Callable[[str], None]

_OWN = tuple(f"eval/{name}.py" for name in ("encode", "plan", "run", "rows", "kvzip", "kvzip_attention"))
DECISIVE = ("child.py", "stepped_engine.py", "prose.py", "tasks/", "texts/", *_OWN)
"""Files under `evaluation/` that decide a figure (see `machine.describe_code`)."""

# A batch holds this many samples for each place of the engine, so that its end leaves few places empty.
_BATCH_FACTOR = 3


class WindowCutShort(RuntimeError):
    """A prompt came out of the prefix cache so far that a policy was judged with too few queries."""


class Evaluation:
    """Measures what is missing of a grid on one model.

    Parameters
    ----------
    model
        What vLLM is given.
    tokenizer
        The model's fast tokenizer.
    conditions
        Model name, machine and code: what a run depends on besides its grid.
    results
        Where cells are kept, and looked for before they are measured.
    folder
        For logs and for what engines hand to each other.
    say
        Is told of progress, a line at a time.
    """

    def __init__(
        self,
        grid: Grid,
        model: str,
        tokenizer: Any,
        conditions: Mapping[str, Any],
        results: Results,
        folder: Path,
        say: Say,
    ) -> None:
        self.grid = grid
        document = grid.model_dump(mode="json")
        # More samples extend a run; none of these changes a cell.
        varied = {"lengths", "tasks", "budgets", "policies", "settings", "fp8", "at_most", "solved", "pairs"}
        self.run_id = run_id({"grid": {k: v for k, v in document.items() if k not in varied}, **conditions})
        self._conditions = {"grid": document, **conditions}
        self._model = model
        self._encoder = Encoder(tokenizer, chat=grid.chat)
        self._window = DeltaMemConfig.from_dict(grid.policy).window
        self._results = results
        self._folder = folder
        self._say = say
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._engines: list[Engine] = []
        self._specs = engine_specs(grid)
        concurrency = grid.engine.concurrency
        self._drawing = Drawing(grid, self._row, _BATCH_FACTOR * concurrency, concurrency)
        self._began = 0.0
        self._measured = 0

    def run(self, workers: int, after_batch: Callable[[], None]) -> str:
        """Measure what is missing and return the run's id.

        Parameters
        ----------
        workers
            Engines side by side.
        after_batch
            Called now and then when new rows are there.
        """
        drawing, left = self._drawing, self._drawing.left()
        planned = planned_keys(self.grid)
        self._say(f"{self.grid.name}: {left} cells {'or so' if planned is None else f'of {len(planned)}'} to measure")
        if not left:
            return self.run_id
        self._began = time.monotonic()
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._work, number, drawing, after_batch) for number in range(workers)]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                # A batch takes minutes. Without their engines the other threads end at once.
                self._halt()
                raise
        for line in drawing.short():
            self._say(
                f"{self.grid.name}: fewer solved than wanted, {line}; greater counts under lengths allow more samples"
            )
        return self.run_id

    def _halt(self) -> None:
        with self._lock:
            self._stop.set()
            for engine in self._engines:
                engine.stop()

    # ---- one worker --------------------------------------------------------------------------------------

    def _work(self, number: int, drawing: Drawing, after_batch: Callable[[], None]) -> None:
        with ExitStack() as stack:
            engines = [(spec, stack.enter_context(self._start(number, spec))) for spec in self._specs]
            self._remember_conditions(engines[0][1])
            while not self._stop.is_set() and (batch := drawing.next()):
                works = [make_work(self.grid, self._encoder, *one.sample, self._window, one.settings) for one in batch]
                self._measure(number, works, engines)
                drawing.finished(batch)
                with self._lock:
                    after_batch()

    def _start(self, number: int, spec: EngineSpec) -> Engine:
        self._say(f"{self.grid.name}: worker {number} starts vLLM ({spec.name})")
        log = self._folder / "logs" / f"{spec.name}-{number}.log"
        engine = Engine(engine_args(self.grid, self._model, spec), log, stock=spec.config is None)
        with self._lock:
            self._engines.append(engine)
            if self._stop.is_set():
                engine.stop()
        return engine

    def _measure(self, number: int, works: list[Work], engines: list[tuple[EngineSpec, Engine]]) -> None:
        """Measure what is missing of some samples, on one engine after another."""
        by_key = {work.key(s, *p): (work, s, *p) for work in works for s in work.encoded for p in self.grid.points()}
        missing = {key for key in by_key if self._results.get(self.run_id, key) is None}
        files = self._exchange(number, works) if len(engines) > 1 else [{} for _ in works]
        references: dict[tuple[int, str], Cell] = {}
        try:
            for spec, engine in engines:
                requests = [
                    requests_of(self.grid, work, spec, missing.__contains__, named)
                    for work, named in zip(works, files, strict=True)
                ]
                for cell in engine.run([some for some in requests if some], self.grid.engine.concurrency):
                    work, setting, policy, budget = by_key[cell["key"]]
                    if policy == FULL:
                        references[id(work), setting] = cell
                    if cell["key"] not in missing:
                        continue
                    if cell["skipped"]:
                        self._write(cell["key"], skipped_row(work, setting, policy, budget))
                        continue
                    self._check_window(work.encoded[setting], cell)
                    row = make_row(work, setting, policy, budget, cell, references[id(work), setting])
                    self._write(cell["key"], {**row, "full_bytes": self._full_bytes(cell, engines[0][1])})
        finally:
            for named in files:
                for file in named.values():
                    Path(file).unlink(missing_ok=True)

    def _exchange(self, number: int, works: list[Work]) -> list[dict[Setting, str]]:
        """For each sample and setting the file in which engines hand the full cache's log-probs on."""
        folder = self._folder / "references"
        folder.mkdir(parents=True, exist_ok=True)
        return [
            {setting: str(folder / f"{number}-{place}-{setting}.npz") for setting in work.encoded}
            for place, work in enumerate(works)
        ]

    def _check_window(self, encoded: Encoded, cell: Cell) -> None:
        computed = len(encoded.prompt) - cell["cached_tokens"]
        least = min(self._window, computed_after_hit(len(encoded.prompt), self.grid.engine.block_size))
        if computed < least:
            raise WindowCutShort(
                f"{cell['key']}: only {computed} tokens of its prompt were computed, the policy looks at {self._window}"
            )

    @staticmethod
    def _full_bytes(cell: Cell, engine: Engine) -> int:
        return int(-(-cell["logical_tokens"] // engine.facts["block_size"]) * engine.facts["block_bytes"])

    # ---- book-keeping ------------------------------------------------------------------------------------

    def _write(self, key: str, row: Mapping[str, Any]) -> None:
        with self._lock:
            self._results.add(self.run_id, key, row)
            self._measured += 1
            if self._measured % 100 == 0:
                took, left = time.monotonic() - self._began, self._drawing.left()
                self._say(f"{self.grid.name}: {left} cells left, about {took / self._measured * left / 60:.0f} min")

    def _remember_conditions(self, engine: Engine) -> None:
        facts = engine.facts
        config = DeltaMemConfig.from_dict(self.grid.policy)
        geometry = {
            **{name: facts[name] for name in ("layers", "kv_heads", "head_size", "dtype", "block_size")},
            "bytes_per_token": facts["block_bytes"] // facts["block_size"],
            **{name: getattr(config, name) for name in ("window", "sink_tokens", "recent_tokens", "interval")},
        }
        with self._lock:
            self._results.add(
                self.run_id, CONDITIONS, {**self._conditions, "command": command_line(), "geometry": geometry}
            )

    def _row(self, key: str) -> dict[str, Any] | None:
        return self._results.get(self.run_id, key)
