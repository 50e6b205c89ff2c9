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
    """A policy that evicts early and often, so that short runs hold many compactions, and deals pages unequally."""
    fields = {
        "mode": "always",
        "keep_ratio": 0.4,
        "min_tokens": 0,
        "sink_tokens": 4,
        "recent_tokens": 8,
        "window": 8,
        "interval": 16,
        "dealing": "global",
        "scorer": "uneven",
        "cold_bits": 0,
    }
    return fields | changes


def equal(**changes: Any) -> dict[str, Any]:
    """The same policy with as many tokens in every (layer, kv head), in stock block tables."""
    # Each head keeps other tokens, which tova's heads do not.
    return policy(dealing="equal", scorer="delta") | changes


BATCH = Scenario(
    name="batch",
    prompts=(210, 160, 290, 100),
    max_tokens=(40, 30),
    config=policy(),
    expected=Expected(compactions=6, repeated_compactions=2, spread=2),
)
BATCH_EQUAL = replace(
    BATCH, name="batch-equal", config=equal(), expected=Expected(compactions=6, repeated_compactions=2, equal=6)
)
# A scorer that a CPU's native library rates pages by; `uneven` is rated in torch.
NATIVE_SCORES = replace(
    BATCH,
    name="native-scores",
    config=policy(scorer="distinct"),
    expected=Expected(compactions=6, repeated_compactions=2),
)
# Round 2 finds the dense blocks that round 1 left behind when it compacted.
CACHE = Scenario(
    name="prefix-cache",
    prompts=(210, 160, 290, 100),
    max_tokens=(24,),
    config=policy(),
    chunk=96,
    prefix_caching=True,
    rounds=2,
    shared_prefix=64,
    expected=Expected(compactions=8, cached_tokens=512, spread=2),
)
CACHE_EQUAL = replace(
    CACHE, name="prefix-cache-equal", config=equal(), expected=Expected(compactions=8, cached_tokens=512, equal=8)
)
LONG = Scenario(
    name="longer-than-pool",
    prompts=(900,),
    max_tokens=(32,),
    config=policy(keep_ratio=0.15),
    chunk=96,
    blocks=20,
    expected=Expected(compactions=3, prefill_compactions=1, chunks_on_compacted=2, spread=2),
)
# All four fit at first, but 10 blocks cannot hold them when they have grown to 180 tokens, even compacted.
PREEMPT = Scenario(
    name="preemption",
    prompts=(60, 50, 64, 54),
    max_tokens=(120,),
    config=policy(keep_ratio=0.8),
    blocks=10,
    max_len=288,
    expected=Expected(
        compactions=8, preemptions=2, preempted_compacted=1, compacted_after_preemption=1, in_place=1, spread=1
    ),
)
ABORT = Scenario(
    name="abort",
    prompts=(150, 170, 190, 140, 160, 200, 130),
    max_tokens=(14, 26, 20, 32),
    config=policy(keep_ratio=0.5),
    chunk=128,
    max_seqs=3,
    aborts=((1, 12), (4, 20)),
    expected=Expected(compactions=6, aborted=2, spread=1),
)
# Internal ids are new, but the rows and slots of the aborted requests are used again in the second round.
ABORT_READD = replace(ABORT, name="abort-and-add-again", rounds=2, expected=replace(ABORT.expected, compactions=12))
FEW = Scenario(
    name="few",
    prompts=(210, 160, 100),
    max_tokens=(30,),
    config=policy(),
    chunk=96,
    expected=Expected(compactions=3, spread=2),
)
FEW_EQUAL = replace(FEW, name="few-equal", config=equal(), expected=Expected(compactions=3, equal=3))
V2_FEW = replace(FEW, name="runner2", runner=2, prefix_caching=True)
V2_FEW_EQUAL = replace(FEW_EQUAL, name="runner2-equal", runner=2, prefix_caching=True)
ASYNC_PREEMPT = replace(PREEMPT, name="async-preemption", asynchronous=True)
PREFILL = Scenario(
    name="during-prefill",
    prompts=(700, 100, 690),
    max_tokens=(24,),
    config=policy(keep_ratio=0.15),
    chunk=96,
    prefix_caching=True,
    blocks=20,
    expected=Expected(compactions=5, prefill_compactions=2, chunks_on_compacted=2, spread=2),
)
# Requests below 128 tokens are left alone, so the pool fills with dense ones first.
PREEMPT_DENSE = Scenario(
    name="preemption-before-compaction",
    prompts=(70, 75, 80, 64),
    max_tokens=(96,),
    config=policy(keep_ratio=0.5, min_tokens=128),
    blocks=12,
    max_len=320,
    prefix_caching=True,
    expected=Expected(compactions=3, preemptions=2, preempted_dense=1, compacted_after_preemption=1, spread=1),
)
# In one batch: a request on dealt pages, one that is never compacted, and a prompt that arrives in chunks.
MIXED = Scenario(
    name="mixed-batch",
    prompts=(210, 100, 500, 160),
    max_tokens=(40, 30),
    config=policy(),
    options=({}, {"deltamem_policy": "off"}),
    chunk=96,
    stagger=3,
    expected=Expected(compactions=3, never_compacted=2, mixed_steps=3, spread=2),
)
# In one batch: dealt pages beside compacted requests in stock block tables.
BOTH_DEALINGS = replace(
    FEW,
    name="both-dealings",
    prompts=(210, 200, 170),
    options=({}, {"deltamem_dealing": "equal"}),
    expected=Expected(compactions=3, equal=1, spread=2),
)
# By the calibration alone, and by it together with the scores.
PROFILE = replace(
    FEW,
    name="profile",
    config=policy(dealing="profile", scorer="tova"),
    calibrated=True,
    expected=Expected(3, spread=1),
)
CALIBRATED = replace(FEW, name="calibrated", calibrated=True)
# Five prompts end in one step, the pool is nearly full, and each compaction lives on blocks that the ones before it
# in the same step have freed.
SAME_STEP = Scenario(
    name="several-in-one-step",
    prompts=(160,) * 5,
    max_tokens=(24,),
    config=policy(),
    chunk=1024,
    max_len=320,
    blocks=29,
    expected=Expected(compactions=5, reused_blocks=4, spread=2),
)

# Requests end at different steps: the graph of four rows is replayed full, then padded. Later compactions are judged
# by queries that only replays recorded (more than `window` tokens after the last eager step).
FULL_GRAPH = Scenario(
    name="runner2-full-graph",
    prompts=(210, 160, 290, 100),
    max_tokens=(80, 40),
    config=policy(),
    runner=2,
    graph_rows=4,
    expected=Expected(compactions=8, repeated_compactions=4, replays=70, padded_replays=30, spread=2),
)
FULL_GRAPH_EQUAL = replace(
    FULL_GRAPH,
    name="runner2-full-graph-equal",
    config=equal(),
    expected=replace(FULL_GRAPH.expected, spread=0, equal=8),
)
# A graph reads every row through the page tables. The equal requests go from four blocks to three and get a fourth in
# the same step: as many as before, but others.
FULL_GRAPH_BOTH = replace(
    FULL_GRAPH,
    name="runner2-full-graph-both-dealings",
    options=({}, {"deltamem_dealing": "equal", "deltamem_keep_tokens": 96}),
    expected=replace(FULL_GRAPH.expected, equal=4),
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
    expected=Expected(compactions=2, spread=2),
)
APPEND_WITH_COMPACTION_EQUAL = replace(
    APPEND_WITH_COMPACTION,
    name="runner2-append-with-compaction-equal",
    config=equal(interval=64),
    expected=Expected(compactions=2, equal=2),
)

# The pool holds the prompts but not what is written after them: blocks are taken where they are worth least.
PRESSURE = Scenario(
    name="pressure",
    prompts=(210, 160, 290, 100),
    max_tokens=(70,),
    config=policy(mode="pressure", keep_ratio=0.2, high_watermark=0.9, low_watermark=0.7),
    blocks=29,
    expected=Expected(compactions=3, spread=2),
)
# Fewer or more blocks for each request, as its scores say.
COVERAGE = replace(
    BATCH,
    name="coverage",
    config=policy(keep_ratio=0.1, coverage=0.7),
    expected=Expected(compactions=4, spread=2),
)

FAST: tuple[Scenario, ...] = (
    BATCH,
    BATCH_EQUAL,
    NATIVE_SCORES,
    CACHE,
    CACHE_EQUAL,
    LONG,
    PREEMPT,
    ASYNC_PREEMPT,
    MIXED,
    PRESSURE,
    V2_FEW,
)

MATRIX: tuple[Scenario, ...] = (
    ABORT,
    ABORT_READD,
    PREFILL,
    PREEMPT_DENSE,
    BOTH_DEALINGS,
    PROFILE,
    CALIBRATED,
    SAME_STEP,
    COVERAGE,
    V2_FEW_EQUAL,
    replace(FEW, name="mistral", model="mistral"),
    replace(FEW, name="qwen2", model="qwen2"),
    replace(FEW, name="qwen3", model="qwen3"),
    replace(CACHE, name="compiled", compiled=True),
    replace(CACHE_EQUAL, name="compiled-equal", compiled=True),
    replace(FEW, name="tp2", tp=2),
    replace(FEW_EQUAL, name="tp2-equal", tp=2),
    replace(CALIBRATED, name="tp2-calibrated", tp=2),
    replace(CACHE, name="tp2-qwen2", model="qwen2", tp=2),
    replace(CACHE, name="async-prefix-cache", asynchronous=True),
    replace(LONG, name="async-longer-than-pool", asynchronous=True),
    replace(ABORT, name="async-abort", asynchronous=True),
    replace(PREEMPT_DENSE, name="async-preemption-before-compaction", asynchronous=True),
    replace(MIXED, name="async-mixed-batch", asynchronous=True),
    replace(SAME_STEP, name="async-several-in-one-step", asynchronous=True),
    replace(CACHE, name="runner2-prefix-cache", runner=2),
    replace(LONG, name="runner2-longer-than-pool", runner=2),
    replace(PREEMPT, name="runner2-preemption", runner=2),
    replace(PREEMPT_DENSE, name="runner2-preemption-before-compaction", runner=2),
    replace(ABORT, name="runner2-abort", runner=2),
    replace(MIXED, name="runner2-mixed-batch", runner=2),
    replace(BOTH_DEALINGS, name="runner2-both-dealings", runner=2),
    replace(SAME_STEP, name="runner2-several-in-one-step", runner=2),
    replace(PRESSURE, name="runner2-pressure", runner=2),
    replace(PRESSURE, name="async-pressure", asynchronous=True),
    replace(COVERAGE, name="async-coverage", asynchronous=True),
    replace(PREEMPT, name="runner2-async-preemption", runner=2, asynchronous=True),
    replace(LONG, name="runner2-async-longer-than-pool", runner=2, asynchronous=True),
    replace(FEW, name="runner2-qwen3", runner=2, model="qwen3"),
    FULL_GRAPH,
    FULL_GRAPH_EQUAL,
    FULL_GRAPH_BOTH,
    replace(FULL_GRAPH, name="runner2-async-full-graph", asynchronous=True),
    REVERSED_WRITES,
    APPEND_WITH_COMPACTION,
    APPEND_WITH_COMPACTION_EQUAL,
    *(
        replace(FEW_EQUAL, name=f"scorer-{scorer}", config=equal(scorer=scorer))
        for scorer in ("snapkv", "tova", "distinct", "keydiff", "streaming", "random")
    ),
    # As users get it: true scores and the shipped calibration. Heads of random weights would hardly differ.
    replace(
        FEW,
        name="smollm2-distinct",
        model="smollm2",
        config=policy(scorer="distinct", calibration="auto"),
        expected=Expected(compactions=3, spread=3),
    ),
    # Scores that cannot be compared across heads, and no calibration: every pair is dealt the same.
    replace(FEW, name="dealt-tova", config=policy(scorer="tova"), expected=Expected(compactions=3)),
    replace(BATCH, name="smollm2", model="smollm2"),
    replace(BATCH_EQUAL, name="smollm2-equal", model="smollm2"),
    replace(FEW, name="runner2-smollm2", model="smollm2", runner=2, max_tokens=(12,)),
)
