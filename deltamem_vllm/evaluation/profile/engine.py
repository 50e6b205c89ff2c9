# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The recording engine, seen from the profile: a child process (`integration.profile_engine`)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deltamem_vllm.evaluation.child import ChildFailed
from deltamem_vllm.evaluation.profile.ragged import Ragged
from deltamem_vllm.evaluation.profile.recording import Coded, Compaction, Recording
from deltamem_vllm.evaluation.stepped_engine import SteppedEngine


class Engine(SteppedEngine):
    """An engine that serves one prompt; see `SteppedEngine` for the parameters."""

    def __init__(self, engine_args: Mapping[str, Any], log: Path) -> None:
        super().__init__("deltamem_vllm.integration.profile_engine", engine_args, log)

    def record(self, prompt: list[int], output_tokens: int) -> Recording:
        """Serve the prompt with exactly `output_tokens` tokens of output and return what was written down."""
        with tempfile.TemporaryDirectory(prefix="deltamem-profile-") as folder:
            arrays = Path(folder) / "arrays.npz"
            command = {"prompt": prompt, "output_tokens": output_tokens, "arrays": str(arrays)}
            answer = self._child.ask(command, "recording")
            if not answer["compactions"]:
                why = "though the budget says it should"
                if self.facts["policy"]["coverage"] is not None:
                    why = "since nothing less has the share of utility that coverage asks for; lower it"
                raise ChildFailed(f"the engine compacted nothing, {why}; its counters: {answer['counters']}")
            if len(answer["written"]) != output_tokens:
                raise ChildFailed(f"asked the engine for {output_tokens} tokens, got {len(answer['written'])}")
            with np.load(arrays) as stored:
                return Recording(
                    steps=answer["steps"],
                    compactions=[
                        Compaction(facts, _ragged(stored, f"survivors_{i}"), _coded(stored, i))
                        for i, facts in enumerate(answer["compactions"])
                    ],
                    utility=stored["utility"],
                    attention=stored["attention"],
                    written=answer["written"],
                    counters=answer["counters"],
                )


def _ragged(stored: Mapping[str, Any], name: str) -> Ragged:
    return Ragged(stored[name], stored[f"{name}_counts"])


def _coded(stored: Mapping[str, Any], compaction: int) -> Coded | None:
    """What a compaction coded; None if it could not."""
    names = [f"{part}_{compaction}" for part in ("coded", "sizes", "stay")]
    return Coded(*(_ragged(stored, name) for name in names)) if names[0] in stored else None


def engine_args(
    model: str, policy: Mapping[str, Any], *, prompt_tokens: int, output_tokens: int, keep: int, chunk: int, block: int
) -> dict[str, Any]:
    """vLLM's engine arguments for one prompt and a pool in which its compaction always has room for the copy.

    Parameters
    ----------
    keep
        Tokens that the first compaction keeps at most.
    chunk
        Tokens of the prompt per engine step.
    block
        Tokens per block.
    """
    length = prompt_tokens + output_tokens
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": "auto",
        "max_model_len": length,
        "block_size": block,
        # A block that the prefix cache shares is not the request's own to free.
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "max_num_seqs": 1,
        "max_num_batched_tokens": chunk,
        # Plus one: vLLM never hands out the null block.
        "num_gpu_blocks_override": -(-length // block) + -(-(keep + output_tokens) // block) + 1,
        "seed": 0,
        "additional_config": {"deltamem": dict(policy)},
    }
