# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""One run of the engine, described by plain values that survive a trip through JSON."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32


@dataclass(frozen=True)
class Expected:
    """Events without which a run proves nothing."""

    compactions: int = 0
    prefill_compactions: int = 0
    repeated_compactions: int = 0
    in_place: int = 0
    preemptions: int = 0
    preempted_dense: int = 0
    preempted_compacted: int = 0
    compacted_after_preemption: int = 0
    cached_tokens: int = 0
    aborted: int = 0
    replays: int = 0
    padded_replays: int = 0
    reversed_writes: int = 0
    spread: int = 0
    """Pages by which some compaction's largest (layer, kv head) must exceed its smallest: dealing did something."""
    equal: int = 0
    """Compactions that kept the same number of tokens in every (layer, kv head)."""
    reused_blocks: int = 0
    """Target blocks that an earlier compaction of the same step had freed."""
    never_compacted: int = 0
    """Finished requests without a compaction."""
    mixed_steps: int = 0
    """Steps in which a compacted request decodes, a never compacted one decodes and a third reads a prompt chunk."""
    chunks_on_compacted: int = 0
    """Prompt chunks of two tokens or more that were written behind a compaction."""
    cold_made: int = 0
    """Cold pages that compactions made."""
    cold_partial: int = 0
    """Those of them that hold fewer tokens than they could."""
    cold_kept: int = 0
    """Cold pages that a later compaction moved as they were."""
    cold_dropped: int = 0
    """Cold pages that a later compaction gave up."""
    cold_prefill: int = 0
    """Cold pages that were made before the end of a prompt: its later chunks are read on top of them."""
    cold_in_place: int = 0
    """Cold pages that a compaction in place made or kept: some were written over what they were made of."""
    lost: int = 0
    """Tokens of a (layer, kv head) that some compaction left in no page, hot or cold, over all of them."""


@dataclass(frozen=True)
class Scenario:
    """What to run.

    Attributes
    ----------
    name: of the test case.
    prompts: tokens of each prompt.
    max_tokens: new tokens of each request, repeated over the requests.
    config: the policy's fields; None runs stock vLLM.
    calibrated: give the engine a calibration under which pairs deserve very different amounts.
    options: each request's own fields (``extra_args``), repeated over the requests.
    model: family of a tiny model, or "smollm2".
    rounds: how often all prompts are submitted, one after the other; later rounds can hit the prefix cache.
    shared_prefix: leading tokens that all prompts have in common.
    prefix_caching, chunk, max_seqs, max_len: of the engine; chunk is the largest number of tokens of one
        step.
    blocks: usable blocks of ``BLOCK_SIZE`` tokens in the pool.
    aborts: (request of round 0, engine step) pairs.
    stagger: engine steps between two submissions.
    runner: 1 or 2, vLLM's model runner.
    asynchronous: schedule one step ahead.
    compiled: torch.compile.
    tp: tensor-parallel ranks.
    graph_rows: requests of the emulated FULL CUDA graph that runs decode steps; 0: none. Runner 2 only.
    reverse_writes: apply each step's block-table writes last to first. Runner 2 only.
    fault: name of a mistake in ``faults.FAULTS`` to make in the run; "" for none.
    expected: events that must happen.
    """

    name: str
    prompts: tuple[int, ...]
    max_tokens: tuple[int, ...]
    config: dict[str, Any] | None
    calibrated: bool = False
    options: tuple[dict[str, Any], ...] = ({},)
    model: str = "llama"
    rounds: int = 1
    shared_prefix: int = 0
    prefix_caching: bool = False
    chunk: int = 256
    max_seqs: int = 8
    max_len: int = 1024
    blocks: int = 400
    aborts: tuple[tuple[int, int], ...] = ()
    stagger: int = 0
    runner: int = 1
    asynchronous: bool = False
    compiled: bool = False
    tp: int = 1
    graph_rows: int = 0
    reverse_writes: bool = False
    fault: str = ""
    expected: Expected = field(default_factory=Expected)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scenario:
        raw = json.loads(text)
        raw["expected"] = Expected(**raw["expected"])
        for name in ("prompts", "max_tokens", "options"):
            raw[name] = tuple(raw[name])
        raw["aborts"] = tuple((i, step) for i, step in raw["aborts"])
        return cls(**raw)

    def prompt_tokens(self, vocab: int) -> list[list[int]]:
        """The prompts: random ids, the same on every call, without ids 0 to 2 (special in every family)."""
        rng = random.Random(f"prompts of {self.shared_prefix}")
        prefix = [rng.randrange(3, vocab) for _ in range(self.shared_prefix)]
        return [(prefix + [rng.randrange(3, vocab) for _ in range(length)])[:length] for length in self.prompts]


@dataclass(frozen=True)
class Compaction:
    """One compaction as the scheduler planned and the workers did it.

    Attributes
    ----------
    target_blocks: how many blocks the survivors got.
    reused_blocks: how many of those an earlier compaction of the same step had freed.
    fewest, most: survivors of the (layer, kv head) that kept the fewest and of the one that kept the most.
    file: survivors[layer][kv head], ascending resident indices of that pair; kv heads of all ranks in order.
    pages_file: what ``recorded_pages.RecordedPages`` says of it; "" where nothing was dealt.
    cold_made, cold_partial, cold_kept, cold_dropped, lost: of this compaction, as in ``Expected``.
    cold_tokens: in all its cold pages.
    """

    step: int
    request: str
    logical_len: int
    resident_before: int
    keep: int
    evicted_before: int
    evicted_after: int
    sink_tokens: int
    recent_tokens: int
    dealing: str
    serial: int
    target_blocks: int
    reused_blocks: int
    in_place: bool
    fewest: int
    most: int
    file: str
    pages_file: str = ""
    cold_made: int = 0
    cold_partial: int = 0
    cold_kept: int = 0
    cold_dropped: int = 0
    cold_tokens: int = 0
    lost: int = 0

    @property
    def spread(self) -> int:
        """Pages between the (layer, kv head) that kept the most and the one that kept the fewest."""
        return (self.most - self.fewest) // BLOCK_SIZE


@dataclass(frozen=True)
class Preemption:
    """A preemption inside the scheduling of ``step``; ``compacted`` if the request had evicted tokens."""

    step: int
    request: str
    compacted: bool


@dataclass(frozen=True)
class Output:
    """One finished request; ``steps[i]`` is the engine step that computed token i."""

    request: str
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    steps: list[int]
    cached_tokens: int


@dataclass(frozen=True)
class Result:
    """Everything a run leaves behind."""

    outputs: list[Output]
    compactions: list[Compaction]
    preemptions: list[Preemption]
    aborted: list[str]
    steps: int
    max_running: int
    free_blocks_at_end: int
    blocks: int
    evicted_at_end: int
    directory: str
    model: str
    ranks: int
    environment: dict[str, str]
    events: dict[str, int]
    """Counts of ``Observer``, and of the emulations: see ``FullGraph`` and ``reverse_block_table_writes``."""

    @classmethod
    def load(cls, path: Path) -> Result:
        raw = json.loads(path.read_text())
        raw["outputs"] = [Output(**o) for o in raw["outputs"]]
        raw["compactions"] = [Compaction(**c) for c in raw["compactions"]]
        raw["preemptions"] = [Preemption(**p) for p in raw["preemptions"]]
        return cls(**raw)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))
