# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The exactness matrix: which runs of the engine are compared with the masked reference.

FAST runs in ``make test``; MATRIX only in ``make test-all``. Every scenario names the events it exists for,
and fails if they did not happen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scenario import Expected, Scenario


def policy(**changes: Any) -> dict[str, Any]:
    """A policy that evicts early and often, so that short runs hold many compactions."""
    fields = {
        "keep_ratio": 0.4,
        "min_tokens": 0,
        "sink_tokens": 4,
        "recent_tokens": 8,
        "window": 8,
        "interval": 16,
        # Each head keeps other tokens, which tova's heads do not.
        "scorer": "delta",
    }
    return fields | changes


BATCH = Scenario(
    name="batch",
    prompts=(150, 100, 200, 60),
    max_tokens=(40, 30),
    config=policy(),
    expected=Expected(compactions=6, repeated_compactions=2),
)
# Round 2 finds the dense blocks that round 1 left behind when it compacted.
CACHE = Scenario(
    name="prefix-cache",
    prompts=(150, 100, 200, 60),
    max_tokens=(24,),
    config=policy(),
    chunk=96,
    prefix_caching=True,
    rounds=2,
    shared_prefix=64,
    expected=Expected(compactions=8, cached_tokens=512),
)
LONG = Scenario(
    name="longer-than-pool",
    prompts=(900,),
    max_tokens=(32,),
    config=policy(keep_ratio=0.1),
    chunk=96,
    blocks=20,
    expected=Expected(compactions=3, prefill_compactions=1),
)
# 11 blocks cannot hold four requests of up to 196 tokens, even compacted.
PREEMPT = Scenario(
    name="preemption",
    prompts=(100, 75, 80, 90),
    max_tokens=(96,),
    config=policy(keep_ratio=0.6),
    blocks=11,
    max_len=320,
    expected=Expected(compactions=8, preemptions=2, preempted_compacted=1, compacted_after_preemption=1, in_place=1),
)
ABORT = Scenario(
    name="abort",
    prompts=(90, 100, 110, 80, 95, 120, 70),
    max_tokens=(14, 26, 20, 32),
    config=policy(),
    chunk=128,
    max_seqs=3,
    aborts=((1, 12), (4, 20)),
    expected=Expected(compactions=6, aborted=2),
)
FEW = Scenario(
    name="few",
    prompts=(150, 100, 60),
    max_tokens=(30,),
    config=policy(),
    chunk=96,
    expected=Expected(compactions=3),
)
V2_FEW = replace(FEW, name="runner2", runner=2, prefix_caching=True)
ASYNC_PREEMPT = replace(PREEMPT, name="async-preemption", asynchronous=True)
PREFILL = Scenario(
    name="during-prefill",
    prompts=(700, 100, 690),
    max_tokens=(24,),
    config=policy(keep_ratio=0.1),
    chunk=96,
    prefix_caching=True,
    blocks=20,
    expected=Expected(compactions=5, prefill_compactions=2),
)
# Requests below 128 tokens are left alone, so the pool fills with dense ones first.
PREEMPT_DENSE = Scenario(
    name="preemption-before-compaction",
    prompts=(70, 75, 80, 64),
    max_tokens=(96,),
    config=policy(min_tokens=128),
    blocks=12,
    max_len=320,
    prefix_caching=True,
    expected=Expected(compactions=3, preemptions=2, preempted_dense=1, compacted_after_preemption=1),
)

# Requests end at different steps: the graph of four rows is replayed full, then padded. Later compactions are judged
# by queries that only replays recorded (more than `window` tokens after the last eager step).
FULL_GRAPH = Scenario(
    name="runner2-full-graph",
    prompts=(150, 100, 200, 60),
    max_tokens=(80, 40),
    config=policy(),
    runner=2,
    graph_rows=4,
    expected=Expected(compactions=8, repeated_compactions=4, replays=70, padded_replays=30),
)
REVERSED_WRITES = replace(
    PREEMPT,
    name="runner2-reversed-writes",
    runner=2,
    reverse_writes=True,
    expected=replace(PREEMPT.expected, reversed_writes=4),
)
# 0.4 * 160 tokens fill two blocks: the step of the compaction also hands out a third one, and a fourth follows
# before the next compaction would rewrite the row.
APPEND_WITH_COMPACTION = Scenario(
    name="runner2-append-with-compaction",
    prompts=(160, 160),
    max_tokens=(48,),
    config=policy(interval=64),
    runner=2,
    expected=Expected(compactions=2),
)

FAST: tuple[Scenario, ...] = (BATCH, CACHE, LONG, PREEMPT, ASYNC_PREEMPT, V2_FEW)

MATRIX: tuple[Scenario, ...] = (
    ABORT,
    PREFILL,
    PREEMPT_DENSE,
    replace(FEW, name="mistral", model="mistral"),
    replace(FEW, name="qwen2", model="qwen2"),
    replace(FEW, name="qwen3", model="qwen3"),
    replace(CACHE, name="compiled", compiled=True),
    replace(FEW, name="tp2", tp=2),
    replace(CACHE, name="tp2-qwen2", model="qwen2", tp=2),
    replace(CACHE, name="async-prefix-cache", asynchronous=True),
    replace(LONG, name="async-longer-than-pool", asynchronous=True),
    replace(ABORT, name="async-abort", asynchronous=True),
    replace(PREEMPT_DENSE, name="async-preemption-before-compaction", asynchronous=True),
    replace(CACHE, name="runner2-prefix-cache", runner=2),
    replace(LONG, name="runner2-longer-than-pool", runner=2),
    replace(PREEMPT, name="runner2-preemption", runner=2),
    replace(PREEMPT_DENSE, name="runner2-preemption-before-compaction", runner=2),
    replace(ABORT, name="runner2-abort", runner=2),
    replace(PREEMPT, name="runner2-async-preemption", runner=2, asynchronous=True),
    replace(LONG, name="runner2-async-longer-than-pool", runner=2, asynchronous=True),
    replace(FEW, name="runner2-qwen3", runner=2, model="qwen3"),
    FULL_GRAPH,
    replace(FULL_GRAPH, name="runner2-async-full-graph", asynchronous=True),
    REVERSED_WRITES,
    APPEND_WITH_COMPACTION,
    *(
        replace(FEW, name=f"scorer-{scorer}", config=policy(scorer=scorer))
        for scorer in ("snapkv", "tova", "keydiff", "streaming", "random")
    ),
    replace(BATCH, name="smollm2", model="smollm2"),
    replace(FEW, name="runner2-smollm2", model="smollm2", runner=2, max_tokens=(12,)),
)
