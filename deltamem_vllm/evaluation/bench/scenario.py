# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Scenarios: what `configs/bench/*.yaml` may say.

A scenario names its engine, its traffic and its targets. There are two kinds. `throughput` sends the same
requests to stock vLLM and to deltamem in turns; `compaction` times compactions against prefills, in one
engine per scorer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, model_validator

from deltamem_vllm.config import DeltaMemConfig


class ScenarioError(ValueError):
    """A scenario that cannot be run, and what to change."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Target(_Strict):
    """A line that a measured quantity must not cross."""

    measure: str
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_side(self) -> Target:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("give exactly one of at_least and at_most")
        return self

    def accepts(self, value: float) -> bool:
        """Whether the value is on the right side."""
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None, "one of the two is set"
        return value <= self.at_most

    def __str__(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


class EngineSettings(_Strict):
    """What both engines of a comparison are started with. What is not named here is vLLM's default."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    block_size: PositiveInt = 32
    prefix_caching: bool = True
    compiled: bool = False
    """vLLM's torch.compile. Off: every step runs eagerly and engines start in seconds, not minutes."""
    max_num_seqs: PositiveInt = 64
    max_num_batched_tokens: PositiveInt = 2048


class Traffic(_Strict):
    """Requests of random tokens; output lengths are exact."""

    requests: PositiveInt
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt

    @property
    def tokens(self) -> int:
        """Tokens of one request from its first to its last."""
        return self.prompt_tokens + self.output_tokens


class _Scenario(_Strict):
    measures: ClassVar[tuple[str, ...]]
    """Quantities a target may name."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    question: str
    engine: EngineSettings = EngineSettings()
    policy: dict[str, Any] = {}
    """Fields of DeltaMemConfig that differ from their defaults."""
    repeats: PositiveInt
    seed: int = 0
    targets: tuple[Target, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> _Scenario:
        DeltaMemConfig.from_dict(self.policy)
        for target in self.targets:
            if target.measure not in self.measures:
                raise ValueError(
                    f"unknown measure {target.measure!r} in targets; available: {', '.join(self.measures)}"
                )
        return self


class ThroughputScenario(_Scenario):
    """The same traffic, all requests at once, on stock vLLM and on deltamem."""

    kind: Literal["throughput"]
    traffic: Traffic
    pool_requests: PositiveInt
    """Whole requests that the KV pool holds."""

    measures = ("output_tokens_per_s", "output_tokens_per_cpu_s", "max_running", "mean_running")
    """Ratios deltamem / stock."""

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return self.traffic.tokens

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool, with the null block that vLLM never hands out."""
        return self.pool_requests * -(-self.traffic.tokens // self.engine.block_size) + 1


class CompactionScenario(_Scenario):
    """One request at a time: the compaction of its prompt against the prefill of a prompt as long."""

    kind: Literal["compaction"]
    prompt_lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    scorers: Annotated[tuple[str, ...], Field(min_length=1)]

    measures = ("compaction_share", "scoring_share")
    """Shares of the prefill's seconds."""

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request, which gets two tokens of output."""
        return max(self.prompt_lengths) + 2

    @property
    def pool_blocks(self) -> int:
        """Room for the longest prompt twice: its compaction is a copy, as on a server that has room."""
        return 2 * -(-self.max_model_len // self.engine.block_size) + 1


Scenario = ThroughputScenario | CompactionScenario
_PARSER: TypeAdapter[Scenario] = TypeAdapter(Annotated[Scenario, Field(discriminator="kind")])


def parse_scenario(given: object, where: str, *, quick: bool = False) -> Scenario:
    """Build a scenario from a parsed YAML document.

    Parameters
    ----------
    given : object
        The document. Its key `quick` holds what a quick run changes.
    where : str
        File name for error messages.
    quick : bool
        Whether to apply these changes.
    """
    if not isinstance(given, Mapping):
        raise ScenarioError(f"{where}: expected a mapping with kind, name, ..., got {type(given).__name__}")
    document = dict(given)
    changes = document.pop("quick", {})
    if not isinstance(changes, Mapping):
        raise ScenarioError(f"{where}: quick must be a mapping of what a quick run changes, got {changes!r}")
    if quick:
        document = _merged(document, changes)
    try:
        return _PARSER.validate_python(document)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in detail['loc'][1:]) or 'scenario'}: {detail['msg']}"
            f" (got {detail['input']!r})"
            for detail in error.errors()
        )
        raise ScenarioError(f"{where}: {problems}. The fields are in {__name__}.") from error


def load_scenario(path: Path, *, quick: bool = False) -> Scenario:
    """Read a scenario from a YAML file."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ScenarioError(f"{path}: not valid YAML: {error}") from error
    return parse_scenario(document, str(path), quick=quick)


def scenario_files(folder: Path) -> dict[str, Path]:
    """The scenarios of a folder by file name without suffix."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_scenario(name: str, folder: Path) -> Path:
    """The file of a scenario, given its name in `folder` or a path."""
    known = scenario_files(folder)
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    listed = ", ".join(known) or f"none, for {folder} has no *.yaml"
    raise ScenarioError(f"no scenario {name!r}; available: {listed}. Or give the path of a YAML file.")


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return merged
