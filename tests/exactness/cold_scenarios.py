# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The part of the exactness matrix in which some pages are cold.

In float32 a page holds 116, 220 or 400 coded tokens of 32 dimensions with 8, 4 or 2 bits: most pages of a short request
are partly filled, and 8 bits fill some.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scenario import Expected, Scenario
from scenarios import (
    ABORT,
    BATCH,
    BOTH_DEALINGS,
    CACHE,
    COVERAGE,
    FEW,
    FULL_GRAPH,
    LONG,
    MIXED,
    NATIVE_SCORES,
    PREEMPT,
    PREFILL,
    PRESSURE,
    PROFILE,
    SAME_STEP,
)
from tiny_models import MHA

# What runs contain must not change with a measurement: what a token is taken to lose, which decides what becomes cold.
LOSS = {8: 0.01, 4: 0.06, 2: 0.3}


def cold(base: Scenario, name: str, bits: int, expected: Expected, config: Any = None, **changes: Any) -> Scenario:
    """``base`` with cold pages of ``bits`` bits an element; ``config`` changes its policy."""
    assert base.config is not None, "cold pages need a policy"
    fields = base.config | {"cold_bits": bits, "cold_loss": LOSS[bits]} | (config or {})
    return replace(base, name=name, config=fields, expected=expected, **changes)


# Compactions every 16 tokens: old pages stay, some are given up, and new ones are made beside them.
COLD_BATCH = cold(
    BATCH,
    "cold-batch",
    2,
    Expected(8, repeated_compactions=4, cold_made=12, cold_partial=12, cold_kept=6, cold_dropped=1, lost=1000),
)
# Cold tokens rated together with hot ones natively.
COLD_NATIVE = cold(
    NATIVE_SCORES,
    "cold-native-scores",
    2,
    Expected(8, repeated_compactions=4, cold_made=6, cold_partial=6, cold_kept=3),
)
# Prompts of which most tokens go: full pages, and more of them than a pair may keep.
COLD_FULL = cold(
    BATCH,
    "cold-full-pages",
    8,
    Expected(8, repeated_compactions=4, cold_made=30, cold_partial=5, cold_kept=20, cold_dropped=4, lost=5000),
    {"keep_ratio": 0.2},
    prompts=(500, 600, 430, 300),
)
# Prompt chunks on top of cold pages.
COLD_LONG = cold(
    LONG,
    "cold-longer-than-pool",
    4,
    Expected(3, prefill_compactions=1, chunks_on_compacted=2, cold_prefill=3, cold_kept=1),
)
COLD_MIXED = cold(MIXED, "cold-mixed-batch", 8, Expected(3, never_compacted=2, mixed_steps=3, cold_made=5, cold_kept=3))
COLD_CACHE = cold(CACHE, "cold-prefix-cache", 4, Expected(8, cached_tokens=512, cold_made=20, cold_kept=8))
COLD_PREEMPT = cold(
    PREEMPT,
    "cold-preemption",
    8,
    Expected(8, preemptions=1, preempted_compacted=1, compacted_after_preemption=1, in_place=1, cold_in_place=3),
    {"keep_ratio": 0.5},
)
COLD_PRESSURE = cold(PRESSURE, "cold-pressure", 4, Expected(3, cold_made=5, cold_kept=3, cold_in_place=5))
COLD_FEW = cold(FEW, "cold-few", 4, Expected(3, cold_made=5, lost=100))
COLD_SAME_STEP = cold(SAME_STEP, "cold-several-in-one-step", 8, Expected(5, reused_blocks=4, cold_made=15, cold_kept=5))
COLD_FULL_GRAPH = cold(
    FULL_GRAPH,
    "runner2-cold-full-graph",
    4,
    Expected(8, repeated_compactions=4, replays=70, padded_replays=30, cold_made=8, cold_kept=4),
)

COLD_FAST: tuple[Scenario, ...] = (COLD_BATCH, COLD_NATIVE, COLD_LONG, COLD_MIXED)

COLD_MATRIX: tuple[Scenario, ...] = (
    COLD_FULL,
    COLD_CACHE,
    COLD_PREEMPT,
    COLD_PRESSURE,
    COLD_SAME_STEP,
    COLD_FULL_GRAPH,
    cold(BATCH, "cold-batch-4", 4, replace(COLD_BATCH.expected)),
    cold(BATCH, "cold-batch-8", 8, replace(COLD_BATCH.expected, cold_partial=5)),
    cold(PREFILL, "cold-during-prefill", 4, Expected(5, prefill_compactions=2, chunks_on_compacted=2, cold_prefill=3)),
    cold(ABORT, "cold-abort", 4, Expected(6, aborted=2, cold_made=5)),
    cold(BOTH_DEALINGS, "cold-both-dealings", 4, Expected(3, equal=1, cold_made=6, cold_kept=3)),
    cold(PROFILE, "cold-profile", 4, Expected(3, cold_made=5)),
    cold(COVERAGE, "cold-coverage", 4, Expected(4, cold_made=4)),
    # Repeats count for less, and are looked for among coded tokens, too.
    cold(BATCH, "cold-redundancy", 4, Expected(6, cold_made=5, cold_kept=2), {"redundancy": 0.8}),
    *(replace(COLD_FEW, name=f"cold-{family}", model=family) for family in ("mistral", "qwen2", "qwen3", MHA)),
    replace(COLD_CACHE, name="cold-compiled", compiled=True),
    replace(COLD_FEW, name="cold-tp2", tp=2),
    replace(COLD_MIXED, name="cold-async-mixed-batch", asynchronous=True),
    replace(COLD_PREEMPT, name="cold-async-preemption", asynchronous=True),
    replace(COLD_BATCH, name="runner2-cold-batch", runner=2),
    replace(COLD_CACHE, name="runner2-cold-prefix-cache", runner=2),
    replace(COLD_LONG, name="runner2-cold-longer-than-pool", runner=2),
    replace(COLD_MIXED, name="runner2-cold-mixed-batch", runner=2),
    replace(COLD_PREEMPT, name="runner2-cold-preemption", runner=2),
    replace(COLD_FULL_GRAPH, name="runner2-async-cold-full-graph", asynchronous=True),
    # As users get it: the shipped calibration and scores that last, which cold tokens take with them.
    *(
        cold(
            BATCH,
            f"smollm2-cold-{bits}",
            bits,
            Expected(6, repeated_compactions=2, cold_made=20, cold_kept=5),
            {"scorer": scorer, "calibration": "auto", "keep_ratio": 0.3},
            model="smollm2",
        )
        for bits, scorer in ((8, "predictor"), (4, "predictor-tova"), (2, "predictor"))
    ),
    cold(
        FEW,
        "runner2-smollm2-cold",
        4,
        Expected(3, cold_made=20),
        {"scorer": "predictor-tova", "calibration": "auto", "cold_loss": None},
        model="smollm2",
        runner=2,
        max_tokens=(12,),
    ),
)
