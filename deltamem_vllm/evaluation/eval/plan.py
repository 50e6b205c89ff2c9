# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which requests a sample becomes: for each engine, each setting, each policy and budget that is still missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from deltamem_vllm.evaluation.eval.encode import Encoded, Encoder, Setting, aligned_sample
from deltamem_vllm.evaluation.eval.engine import Request
from deltamem_vllm.evaluation.eval.grid import FP8, FP8_BUDGET, FULL, Grid, Policy
from deltamem_vllm.evaluation.tasks import TASKS, Sample, make_sample
from deltamem_vllm.request_options import COLD, DEALING, KEEP_RATIO, POLICY, SCORER


@dataclass(frozen=True)
class EngineSpec:
    """One engine of a grid and the (policy, budget) points it serves.

    Parameters
    ----------
    name
        For logs.
    config
        Fields of DeltaMemConfig; None is stock vLLM with an fp8 KV cache.
    points
        (policy, budget, options of each of its requests).
    """

    name: str
    config: dict[str, Any] | None
    points: tuple[tuple[str, float, dict[str, Any]], ...]


def engine_specs(grid: Grid) -> list[EngineSpec]:
    """The engines of a grid. The first one also serves the full cache, which the others are compared with."""
    by_config: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    for policy in grid.policies:
        config = grid.config_of(policy)
        _, members = by_config.setdefault(json.dumps(config, sort_keys=True), (config, []))
        members.append(policy)
    specs = []
    for number, (config, members) in enumerate(by_config.values()):
        scorers = list(dict.fromkeys(policy.scorer for policy in members))
        points = [
            (policy.name, budget, {KEEP_RATIO: budget, **_options(policy, config)})
            for policy in members
            for budget in grid.budgets
        ]
        full = [] if number else [(FULL, 1.0, {POLICY: "off"})]
        own = {**config, "scorer": scorers[0], "request_scorers": scorers[1:]}
        specs.append(EngineSpec(f"policies-{number}", own, tuple(full + points)))
    if grid.fp8:
        specs.append(EngineSpec(FP8, None, ((FP8, FP8_BUDGET, {}),)))
    return specs


def _options(policy: Policy, config: dict[str, Any]) -> dict[str, Any]:
    """What each request of a policy asks for, besides its budget."""
    options = {SCORER: policy.scorer, DEALING: policy.dealing}
    if not config.get("cold_bits"):
        return options
    return options | {COLD: "on" if policy.cold and policy.dealing != "equal" else "off"}


def engine_args(grid: Grid, model: str, spec: EngineSpec) -> dict[str, Any]:
    """vLLM's engine arguments. The pool holds every sample at work whole, and the copy of its compaction."""
    settings = grid.engine
    # An engine that could not hold the forced text of a sample would preempt.
    longest = max(grid.lengths) + grid.most_forced
    blocks = 2 * settings.concurrency * -(-longest // settings.block_size) + 1
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "dtype": settings.dtype,
        "max_model_len": longest,
        "block_size": settings.block_size,
        "enable_prefix_caching": True,
        "enforce_eager": True,
        "max_num_seqs": settings.concurrency,
        "max_num_batched_tokens": max(settings.max_num_batched_tokens, settings.concurrency),
        "num_gpu_blocks_override": blocks,
        "seed": grid.seed,
    }
    if spec.config is None:
        return arguments | {"kv_cache_dtype": "fp8"}
    return arguments | {"additional_config": {"deltamem": spec.config}}


@dataclass(frozen=True)
class Work:
    """One sample with its requests in every setting.

    Parameters
    ----------
    length
        The length of the grid it belongs to; its own may be a few tokens less.
    """

    length: int
    sample: Sample
    encoded: dict[Setting, Encoded]

    def key(self, setting: Setting, policy: str, budget: float) -> str:
        """Key of a cell."""
        return cell_key(self.length, self.sample.task, self.sample.index, setting, policy, budget)


def cell_key(length: int, task: str, index: int, setting: str, policy: str, budget: float) -> str:
    """Key of a cell in the results."""
    return f"{length}/{task}/{index}/{setting}/{policy}/{budget}"


def settings_of(grid: Grid, task: str) -> tuple[Setting, ...]:
    """The settings a task is measured in."""
    info = TASKS[task]
    if info.kind != "question":
        return ("text",)
    return tuple(setting for setting in grid.settings if setting != "two-turn" or info.has_follow_up)


def sample_keys(grid: Grid, length: int, task: str, index: int) -> list[str]:
    """Keys of one sample's cells."""
    return [
        cell_key(length, task, index, setting, policy, budget)
        for setting in settings_of(grid, task)
        for policy, budget in grid.points()
    ]


def all_keys(grid: Grid) -> list[str]:
    """Keys of all cells of a grid; of one that wants numbers of solved questions, all that there may be."""
    return [key for one in grid.samples() for key in sample_keys(grid, *one)]


def planned_keys(grid: Grid) -> list[str] | None:
    """Keys of all cells of a finished run; None where the full cache's answers decide how many there are."""
    return None if grid.solved else all_keys(grid)


def make_work(
    grid: Grid,
    encoder: Encoder,
    length: int,
    task: str,
    index: int,
    window: int,
    settings: Collection[Setting] | None = None,
) -> Work:
    """Make and encode one sample, for the settings that are wanted; the sample is the same for any."""

    def encode(sample: Sample) -> dict[Setting, Encoded]:
        return {
            setting: encoder.encode(sample, setting, most_forced=grid.continuation_tokens)
            for setting in settings_of(grid, task)
        }

    sample, _ = aligned_sample(
        lambda n: make_sample(task, index, seed=grid.seed, length=n, count_tokens=encoder.count),
        lambda one: list(encode(one).values()),
        length,
        grid.engine.block_size,
        window,
    )
    encoded = encode(sample)
    return Work(length, sample, {one: encoded[one] for one in encoded if settings is None or one in settings})


def requests_of(
    grid: Grid,
    work: Work,
    spec: EngineSpec,
    is_missing: Callable[[str], bool],
    reference_files: Mapping[Setting, str],
) -> list[Request]:
    """The missing requests of a sample on one engine; each setting's reference first, on the engine that has it.

    Parameters
    ----------
    is_missing
        Whether the cell with this key has to be measured.
    reference_files
        Where the full cache's log-probs of a setting are handed from engine to engine; empty if there is one engine.
    """
    has_reference = any(policy == FULL for policy, _, _ in spec.points)
    requests: list[Request] = []
    for setting, encoded in work.encoded.items():
        wanted = [point for point in spec.points if is_missing(work.key(setting, *point[:2]))]
        if has_reference and wanted_anywhere(grid, work, setting, is_missing):
            # Measured again if the cell is there already: the others are compared with its log-probs.
            wanted = [point for point in spec.points if point[0] == FULL] + [p for p in wanted if p[0] != FULL]
        for policy, budget, options in wanted:
            requests.append(
                Request(
                    key=work.key(setting, policy, budget),
                    prompt=list(encoded.prompt),
                    forced=None if encoded.forced is None else list(encoded.forced),
                    generate=grid.generation_tokens,
                    measured=list(encoded.measured),
                    options=options,
                    is_reference=policy == FULL,
                    reference=setting,
                    reference_file=reference_files.get(setting, ""),
                    only_if_solved=grid.skips_unsolved and policy != FULL and work.sample.kind == "question",
                )
            )
    return requests


def wanted_anywhere(grid: Grid, work: Work, setting: Setting, is_missing: Callable[[str], bool]) -> bool:
    """Whether any cell of this sample and setting is missing."""
    return any(is_missing(work.key(setting, *point)) for point in grid.points())
