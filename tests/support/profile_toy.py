# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A small recording of `deltamem profile`, made without an engine: three layers, two kv heads, two compactions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deltamem_vllm.evaluation.profile.build import assemble, policy_of
from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.ragged import Ragged
from deltamem_vllm.evaluation.profile.recording import Coded, Compaction, Recording, Step
from deltamem_vllm.scoring.base import select_survivors

LAYERS, HEADS, PROMPT, SINKS, RECENT, BLOCK, TOKEN_BYTES = 3, 2, 120, 2, 4, 8, 64
PAIRS, COLD_PAGE = LAYERS * HEADS, 20

# Of the profile with cold pages, after its two compactions: hot pages, tokens of the cold pages that each makes, and
# which of the old ones stay. Either leaves three pages a pair, on average.
HOT = np.array([[1, 2], [3, 1], [1, 2]]), np.array([[2, 1], [1, 1], [3, 2]])
MADE = (
    [[[20], [20, 20, 20]], [[], [20]], [[20, 5], [20]]],
    [[[6], []], [[12], []], [[], [16]]],
)
STAY = ([[[], []], [[], []], [[], []]], [[[0], [0, 2]], [[], [0]], [[1], []]])
COLD = np.array([[1, 3], [0, 1], [2, 1]]), np.array([[2, 2], [1, 1], [1, 1]])


def survivors(scores: Sequence[np.ndarray], keep: np.ndarray) -> Ragged:
    """Of each pair, in order, the `keep` tokens that the engine would choose."""
    layers, heads = keep.shape
    chosen = [
        select_survivors(torch.from_numpy(one)[None], int(count), SINKS, RECENT)[0].numpy()
        for one, count in zip(scores, keep.ravel(), strict=True)
    ]
    return Ragged.of([chosen[layer * heads : (layer + 1) * heads] for layer in range(layers)])


def compaction(
    step: int, index: Ragged, before: int, logical: int, scorer: str, dealing: str, coded: Coded | None = None
) -> Compaction:
    """One whose pages hold what the scheduler counted: hot ones their tokens, cold ones a block each."""
    keep = (int(index.counts.sum()) + BLOCK * (0 if coded is None else int(coded.pages.sum()))) // index.counts.size
    facts = {
        "step": step,
        "scorer": scorer,
        "dealing": dealing,
        "serial": 0 if dealing == "equal" else step,
        "logical_len": logical,
        "resident_before": before,
        "keep": keep,
        "sink_tokens": SINKS,
        "recent_tokens": RECENT,
        "source_blocks": -(-before // BLOCK),
        "target_blocks": -(-keep // BLOCK),
    }
    return Compaction(facts, index, coded)


def coded_of(exact: Ragged, lengths: np.ndarray, made: Any, stay: Any, rng: np.random.Generator) -> Coded:
    """New cold pages of these sizes, of any tokens that did not stay exact."""
    tokens: list[list[np.ndarray]] = [[np.zeros(0, dtype=int) for _ in range(HEADS)] for _ in range(LAYERS)]
    for at in np.ndindex(LAYERS, HEADS):
        layer, head = at
        left = rng.permutation(np.setdiff1d(np.arange(lengths[at]), exact[at]))
        for size in made[layer][head]:
            tokens[layer][head] = np.concatenate([tokens[layer][head], np.sort(left[:size])])
            left = left[size:]
    return Coded(Ragged.of(tokens), Ragged.of(made), Ragged.of(stay))


def recording(scorer: str = "tova", dealing: str = "equal", *, cold: bool = False) -> Recording:
    """A prompt in two chunks, kept down to 24 tokens (a mean), and after 16 new ones again down to 25 or 24."""
    rng = np.random.default_rng(0)
    utility = (rng.random((LAYERS, HEADS, PROMPT)) ** 8).astype(np.float32)
    if scorer == "keydiff":
        utility = 2 * utility - 1
    attention = rng.random((LAYERS, HEADS, PROMPT)).astype(np.float32)
    attention /= attention.sum(2, keepdims=True)
    once, again = np.full((LAYERS, HEADS), 24), np.full((LAYERS, HEADS), 25)
    if cold:
        once, again = BLOCK * HOT[0], BLOCK * HOT[1]
    elif dealing != "equal":
        once = BLOCK * np.array([[1, 6], [4, 1], [3, 3]])
        again = BLOCK * np.array([[3, 8], [2, 1], [1, 3]])
    later = [rng.random(count + 16).astype(np.float32) for count in once.ravel()]
    exact = survivors(utility.reshape(-1, PROMPT), once), survivors(later, again)
    coded: list[Coded | None] = [None, None]
    if cold:
        lengths = np.full((LAYERS, HEADS), PROMPT), once + 16
        coded = [coded_of(exact[i], lengths[i], MADE[i], STAY[i], rng) for i in range(2)]
    first = compaction(2, exact[0], PROMPT, PROMPT, scorer, dealing, coded[0])
    second = compaction(18, exact[1], 40, PROMPT + 16, scorer, dealing, coded[1])
    return Recording(_steps([first, second]), [first, second], utility, attention, [1] * 21, {"compactions": 2})


def make(scorer: str = "tova", dealing: str = "equal", *, cold: bool = False, **facts: Any) -> Profile:
    """The profile of that recording; `facts` of the engine as given."""
    engine = {
        "block_tokens": BLOCK,
        "block_bytes": BLOCK * TOKEN_BYTES,
        "vllm": "0",
        "device": "cpu",
        "policy": {**policy_of({"scorer": scorer, "dealing": dealing}).to_json_dict(), "keep_ratio": 0.2},
        "comparable_scores": False,
        "calibration": None if dealing == "equal" else "0123",
        "cold": {"bits": 4, "page_tokens": COLD_PAGE, "loss": 0.09} if cold else None,
        **facts,
    }
    prompt = {"source": "--text", "tokens": PROMPT, "marks": [{"name": "fact", "start": 50, "stop": 55}]}
    return assemble(recording(scorer, dealing, cold=cold), engine, prompt, {"model": "toy"})


def _steps(compactions: Sequence[Compaction]) -> list[Step]:
    by_step = {one.facts["step"]: one for one in compactions}
    steps: list[Step] = []
    logical, resident, cold_bytes, cold_tokens = 0, 0, 0, 0
    for number, new in enumerate([60, 60] + [1] * 20):
        done = by_step.get(number)
        if done is not None:
            resident = done.facts["keep"]
        if done is not None and done.coded is not None:
            cold_bytes = int(done.coded.pages.sum()) * BLOCK * TOKEN_BYTES // PAIRS
            # Of the second, the tokens in old pages that stay: two whole ones of a pair, one each of two, one of five.
            cold_tokens = (int(done.coded.tokens.counts.sum()) + (0 if number == 2 else 85)) // PAIRS
        resident, logical = resident + new, logical + new
        steps.append(
            Step(
                kind="prefill" if number < 2 else "compaction" if number in by_step else "decode",
                new_tokens=new,
                logical_tokens=logical,
                resident_tokens=resident,
                logical_bytes=logical * TOKEN_BYTES,
                tier_bytes={"cold": cold_bytes, "hot": resident * TOKEN_BYTES - cold_bytes},
                cold_tokens=cold_tokens,
                blocks=-(-resident // BLOCK),
            )
        )
    return steps
