# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What `deltamem eval` records equals, token by token, what a masked float32 model computes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Reference
from tiny_models import VOCAB, build_tiny_model

from deltamem_vllm.evaluation.eval.engine import Cell, Engine, Request

TOLERANCE = 1e-4  # float32 in another order of additions, as in test_exactness
CONTROL = 1e-2
BLOCK = 32
SINK, RECENT = 4, 32
# Forced texts of different lengths: requests leave the batch one by one, so rows move.
PROMPTS, FORCED = (200, 170, 231), (9, 21, 14)
RATIO = 0.3


def request(sample: int, policy: str, options: dict[str, Any], prompt: list[int], forced: list[int] | None) -> Request:
    count = 12 if forced is None else len(forced)
    return Request(
        key=f"{sample}/{policy}",
        prompt=prompt,
        forced=forced,
        generate=count,
        measured=list(range(1, count)),
        options=options,
        is_reference=policy == "full",
        reference="text",
        reference_file="",
        only_if_solved=False,
    )


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(2, VOCAB) for _ in range(length)] for length in PROMPTS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def cells(
    model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[list[int], Cell]]]:
    """By key: the prompt and what was recorded. The last sample's text is what the full cache writes itself."""
    draw = random.Random(6)
    samples = []
    for number, (prompt, length) in enumerate(zip(prompts, FORCED, strict=True)):
        forced = None if number == 2 else [draw.randrange(2, VOCAB) for _ in range(length)]
        samples.append(
            [
                request(number, "full", {"deltamem_policy": "off"}, prompt, forced),
                # Another scorer than the server's: its survivors are known without asking the engine.
                request(number, "streaming", {"deltamem_scorer": "streaming"}, prompt, forced),
                request(number, "whole", {"deltamem_keep_ratio": 1.0}, prompt, forced),
            ]
        )
    config = {
        "mode": "always",
        "dealing": "equal",
        "keep_ratio": RATIO,
        "min_tokens": 0,
        "recent_tokens": RECENT,
        "scorer": "snapkv",
        "request_scorers": ["streaming"],
    }
    arguments = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": BLOCK,
        "enforce_eager": True,
        "max_num_seqs": 4,
        # Prompts arrive in several chunks, and each chunk passes the processor.
        "max_num_batched_tokens": 128,
        "num_gpu_blocks_override": 96,
        "additional_config": {"deltamem": config},
    }
    log = tmp_path_factory.mktemp("replay") / "engine.log"
    with Engine(arguments, log, stock=False) as engine:
        found = {cell["key"]: cell for cell in engine.run(samples, concurrency=3)}
    yield {key: (prompts[int(key[0])], cell) for key, cell in found.items()}


def test_recorded_log_probs_equal_the_masked_reference(model: Path, cells: dict[str, tuple[list[int], Cell]]) -> None:
    reference = Reference(model)
    differences = []
    for number in range(len(PROMPTS)):
        prompt, full = cells[f"{number}/full"]
        streaming = cells[f"{number}/streaming"][1]
        assert streaming["written"] == full["written"]
        dense = rows_of(reference, prompt, full, keep=None)
        keep = math.ceil(RATIO * len(prompt))
        masked = rows_of(reference, prompt, streaming, keep=keep)
        assert_recorded(full, dense)
        assert_recorded(streaming, masked)
        kl = (dense.exp() * (dense - masked)).sum(-1)
        assert torch.allclose(torch.tensor(streaming["kl"]), kl, atol=TOLERANCE, rtol=1e-4)
        differences.append(float(kl.max()))
        # With nothing evicted a policy is the full cache, bit for bit.
        assert cells[f"{number}/whole"][1]["gold"] == full["gold"]
        assert max(cells[f"{number}/whole"][1]["kl"]) < 1e-6
    assert min(differences) > CONTROL, "eviction changed next to nothing, so the comparison proves nothing"


def test_bytes_are_what_the_scheduler_holds(cells: dict[str, tuple[list[int], Cell]]) -> None:
    for number, length in enumerate(PROMPTS):
        full, streaming = cells[f"{number}/full"][1], cells[f"{number}/streaming"][1]
        block_bytes = 3 * 2 * BLOCK * 2 * 32 * 4  # layers, kv heads, slots, key and value, head size, float32
        # In the step of the first measured token the cache holds the prompt and both tokens written so far.
        assert (full["logical_tokens"], full["resident_tokens"]) == (length + 1, length + 1)
        assert full["resident_bytes"] == -(-(length + 1) // BLOCK) * block_bytes
        kept = math.ceil(RATIO * length)
        assert (streaming["compactions"], streaming["resident_tokens"]) == (1, kept + 1)
        assert streaming["resident_bytes"] == -(-(kept + 1) // BLOCK) * block_bytes


def rows_of(reference: Reference, prompt: list[int], cell: Cell, keep: int | None) -> torch.Tensor:
    """Log-probs [measured, vocabulary]; with `keep`, decoded tokens see sinks and the newest of the prompt."""
    sequence = [*prompt, *cell["written"]][:-1]
    visible = torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()
    if keep is not None:
        visible[len(prompt) :, SINK : len(prompt) - (keep - SINK)] = False
    masks = [visible.repeat(reference.kv_heads, 1, 1)] * reference.layers
    rows = reference.logprobs(sequence, masks)
    return rows[[len(prompt) - 1 + position for position in cell["positions"]]]


def assert_recorded(cell: Cell, rows: torch.Tensor) -> None:
    written = torch.tensor([cell["written"][position] for position in cell["positions"]])
    gold = rows.gather(-1, written.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(torch.tensor(cell["gold"]), gold, atol=TOLERANCE, rtol=0)
    assert cell["argmax"] == rows.argmax(-1).tolist()
