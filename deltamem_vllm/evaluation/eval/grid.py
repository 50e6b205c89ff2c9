# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What an evaluation asks: tasks x lengths x settings x policies x budgets, read from YAML.

Budgets are shares of the bytes that the full cache needs for the same tokens. Four controls are in every grid: the
full cache, vLLM's own fp8 cache (half the bytes), and `streaming` and `random` at every budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.evaluation.configs import configs
from deltamem_vllm.evaluation.tasks import TASKS

FULL, FP8 = "full", "fp8"
CONTROLS = ("streaming", "random")
KVZIP = "kvzip"
"""A scorer of the evaluation's engines alone; see `eval.kvzip`."""
FP8_BUDGET = 0.5
LONGEST_ANSWERS = 512
"""Tokens that follow a prompt which is asked something, at most."""
# Indices of one length that are measured together: enough samples to fill the engines.
_STRIDE = 2

Budget = Annotated[float, Field(gt=0, lt=1)]
Dealing = Literal["global", "profile", "equal"]


class GridError(ValueError):
    """A grid that cannot be run; the message says what is wrong and what is allowed."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Policy(_Strict):
    """One line of the tables."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    scorer: str
    dealing: Dealing = "global"
    """How layers and heads share the budget."""
    cold: bool = True
    """Whether pages may be cold, where the configuration has ``cold_bits``."""
    config: dict[str, Any] = {}
    """Fields of DeltaMemConfig that differ from the grid's; such a policy gets an engine of its own."""


class EngineSettings(_Strict):
    """How vLLM runs; the same for all policies."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    block_size: PositiveInt = 32
    max_num_batched_tokens: PositiveInt = 2048
    concurrency: PositiveInt = 4
    """Samples that one engine works on side by side."""


class Grid(_Strict):
    """All questions of one evaluation."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    lengths: Annotated[dict[int, PositiveInt], Field(min_length=1)]
    """Prompt length in tokens: samples of each task, at most if `solved` is given."""
    solved: dict[int, PositiveInt] = {}
    """Prompt length: questions that the full cache solves, over all tasks, in each setting. Samples are drawn, the
    tasks in turn, until there are so many; policies are then asked no others. One number stands for all lengths."""
    at_most: dict[str, PositiveInt] = {}
    """Fewer samples for some tasks."""
    settings: Annotated[tuple[Literal["aware", "agnostic", "two-turn"], ...], Field(min_length=1)]
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)]
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)]
    fp8: bool = True
    """Whether vLLM's fp8 KV cache is a control; a CPU needs AVX-512 or AMX for it."""
    policy: dict[str, Any] = {}
    """Fields of DeltaMemConfig for all policies."""
    chat: bool = True
    """Whether questions go through the model's chat template, if it has one."""
    only_solved: bool = False
    """Whether policies are asked only what the full cache solves. Saves time where a small model fails a lot; nothing
    is then learned about the log-probs of answers that it did not know."""
    continuation_tokens: PositiveInt = 128
    generation_tokens: PositiveInt = 256
    pairs: tuple[tuple[str, str], ...] = ()
    """Policies that the report compares sample by sample, as [mine, theirs]."""
    seed: int = 0
    engine: EngineSettings = EngineSettings()

    @field_validator("solved", mode="before")
    @classmethod
    def _one_number_is_for_all_lengths(cls, given: Any, info: ValidationInfo) -> Any:
        return dict.fromkeys(info.data.get("lengths", {}), given) if isinstance(given, int) else given

    @field_validator("policies", mode="before")
    @classmethod
    def _names_are_scorers(cls, given: Any) -> Any:
        """A plain name is a policy with that scorer, with or without the dealing behind it (``tova-equal``).

        The controls need not be listed; they are what they are in papers, with the same number of tokens for each head.
        """
        if not isinstance(given, list | tuple):
            return given
        listed = [_named(one) if isinstance(one, str) else one for one in given]
        names = {one.get("name") if isinstance(one, Mapping) else getattr(one, "name", None) for one in listed}
        return [*listed, *(_named(name) for name in CONTROLS if name not in names)]

    @model_validator(mode="after")
    def _check(self) -> Grid:
        unknown = [task for task in (*self.tasks, *self.at_most) if task not in TASKS]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; available: {', '.join(TASKS)}")
        names = [policy.name for policy in self.policies]
        if len({*names, FULL, FP8}) != len(names) + 2:
            raise ValueError(f"policies need names of their own, not {FULL} or {FP8}; got {', '.join(names)}")
        for length in self.lengths:
            least = max(TASKS[task].min_length for task in self.tasks)
            if length < least:
                raise ValueError(f"length {length} is too short for these tasks; allow at least {least}")
        for length in self.solved.keys() - self.lengths.keys():
            raise ValueError(f"solved names length {length}, which is none of {', '.join(map(str, self.lengths))}")
        for name in {name for pair in self.pairs for name in pair} - {*names, FULL, FP8}:
            raise ValueError(f"pairs names {name!r}, which is no policy of this grid; there are {', '.join(names)}")
        for policy in self.policies:
            config = DeltaMemConfig.from_dict(self.config_of(policy))
            if policy.scorer == KVZIP and config.interval < self.most_forced:
                raise ValueError(
                    f"kvzip rates prompts and not what is decoded, so it can be compacted once only: with policy: "
                    f"{{interval: {self.most_forced}}} or more it is; got {config.interval}"
                )
        return self

    @property
    def most_forced(self) -> int:
        """Tokens after a prompt, at most: two answers and a question, or a text of the given length."""
        return max(LONGEST_ANSWERS, self.continuation_tokens, self.generation_tokens)

    @property
    def skips_unsolved(self) -> bool:
        """Whether policies are asked only what the full cache solves."""
        return self.only_solved or bool(self.solved)

    def config_of(self, policy: Policy) -> dict[str, Any]:
        """The policy's DeltaMemConfig fields. Short prompts are evicted too: a budget is a budget."""
        return {"mode": "always", "min_tokens": 0, "seed": self.seed, **self.policy, **policy.config}

    def samples(self) -> Iterator[tuple[int, str, int]]:
        """(length, task, index) of every sample: a few indices of all lengths and tasks, then the next few, so that
        an interrupted run is balanced."""
        for start in range(0, max(self.lengths.values()), _STRIDE):
            for length, count in sorted(self.lengths.items()):
                for index in range(start, min(start + _STRIDE, count)):
                    yield from ((length, task, index) for task in self.tasks if index < self.at_most.get(task, count))

    def points(self) -> list[tuple[str, float]]:
        """Every (policy, budget) of the tables, the full cache first."""
        points = [(FULL, 1.0)]
        points += [(FP8, FP8_BUDGET)] if self.fp8 else []
        return points + [(policy.name, budget) for policy in self.policies for budget in self.budgets]


def _named(name: str) -> dict[str, Any]:
    """The policy that a plain name stands for."""
    scorer, _, dealing = name.rpartition("-")
    if scorer and dealing in get_args(Dealing):
        return {"name": name, "scorer": scorer, "dealing": dealing}
    return {"name": name, "scorer": name, "dealing": "equal" if name in CONTROLS else "global"}


def parse_grid(given: object, where: str, *, quick: bool = False) -> Grid:
    """Build a grid from a parsed YAML document; its key `quick` holds what a quick run changes."""
    if not isinstance(given, Mapping):
        raise GridError(f"{where}: expected a mapping with name, tasks, lengths, ..., got {type(given).__name__}")
    document = dict(given)
    changes = document.pop("quick", {})
    if not isinstance(changes, Mapping):
        raise GridError(f"{where}: quick must be a mapping of what a quick run changes, got {changes!r}")
    try:
        return Grid(**(document | (dict(changes) if quick else {})))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, detail['loc'])) or 'grid'}: {detail['msg']}" for detail in error.errors()
        )
        raise GridError(f"{where}: {problems}. The fields are in {__name__}.") from error


def load_grid(path: Path, *, quick: bool = False) -> Grid:
    """Read a grid from a YAML file."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GridError(f"cannot read the grid {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise GridError(f"{path}: not valid YAML: {error}") from error
    return parse_grid(document, str(path), quick=quick)


def grid_files(folder: Path | None = None) -> dict[str, Path]:
    """The grids that come with deltamem, by name."""
    return {path.stem: path for path in sorted((folder or configs("eval")).glob("*.yaml"))}


def find_grid(name: str, folder: Path | None = None) -> Path:
    """The file of a grid, given its name or a path."""
    known = grid_files(folder)
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    raise GridError(f"no grid {name!r}; available: {', '.join(known)}. Or give the path of a YAML file.")


def narrowed(
    grid: Grid,
    *,
    samples: int | None,
    lengths: list[int] | None,
    tasks: list[str] | None,
    policies: list[str] | None,
    budgets: list[float] | None = None,
) -> Grid:
    """A grid with parts of it replaced from the command line; None leaves a part as it is.

    Of ``policies``, names that the grid has are the grid's policies, and its pairs of those stay; others are scorers.
    """
    document = grid.model_dump()
    if lengths is not None:
        document["lengths"] = {length: grid.lengths.get(length, max(grid.lengths.values())) for length in lengths}
    if samples is not None:
        document["lengths"] = dict.fromkeys(document["lengths"], samples)
    document["solved"] = {length: count for length, count in grid.solved.items() if length in document["lengths"]}
    if tasks is not None:
        document["tasks"] = tasks
    if policies is not None:
        own = {policy.name: policy.model_dump() for policy in grid.policies}
        document["policies"] = [own.get(name, name) for name in policies]
        document["pairs"] = [pair for pair in grid.pairs if set(pair) <= set(policies)]
    if budgets is not None:
        document["budgets"] = budgets
    return parse_grid(document, f"grid {grid.name}, as changed on the command line")
