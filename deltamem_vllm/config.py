# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The policy's configuration: one frozen model that flags, help texts and documents are made from.

It travels as plain JSON in ``vllm_config.additional_config["deltamem"]``; the policy is active exactly
when that key is present. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

AUTO = "auto"

CONFIG_KEY = "deltamem"
"""Key of vLLM's ``additional_config`` that holds the policy's configuration."""

_IN_WORDS = {
    "scorer": "'auto' or an installed scorer",
    "request_scorers": "installed scorers",
    "calibration": "'auto', 'none' or a path",
}
"""Fields whose range no constraint says."""


class ConfigError(ValueError):
    """A configuration that cannot be used: what was given, what is allowed, how to fix it."""


class DeltaMemConfig(BaseModel):
    """How much of a request's KV cache is kept, which tokens, and when."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    mode: Literal["pressure", "always"] = "pressure"
    """`pressure` evicts only as the pool fills; `always` holds every request to its budget, however empty it is."""

    keep_ratio: float = Field(default=0.1, gt=0, le=1)
    """Share of a request's tokens that stays in the KV cache whatever the pressure; 1 keeps everything. The budget
    in mode `always`, the least a request is left with in mode `pressure` or with `coverage`."""

    keep_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a request that stay, however long it is, instead of the share `keep_ratio`."""

    coverage: float | None = Field(default=None, gt=0, le=1)
    """Keep the fewest pages with this share of a request's utility, between `keep_ratio` and `max_keep_ratio`. An easy
    prompt then keeps less than a dense one."""

    max_keep_ratio: float = Field(default=1.0, gt=0, le=1)
    """Largest share of a request's tokens that `coverage` may keep."""

    dealing: Literal["global", "profile", "equal"] = "global"
    """How the pages of a request are shared among layers and heads: by what the scores of this request say, by the
    calibration's profile alone, or the same number for each. `global` takes the profile into account, too, where there
    is a calibration."""

    calibration: str = Field(default="auto", min_length=1)
    """What was learned of the model by `deltamem calibrate`: found by the model's fingerprint, a path, or nothing."""

    redundancy: float = Field(default=0.0, ge=0, le=1)
    """Similarity from which an entry counts as a repeat of another and is worth less; 0 looks for no repeats."""

    cold_bits: Literal["auto", 0, 2, 4, 8] = "auto"
    """Bits an element of tokens that are worth keeping, but not in full: several of them take the place of one. `auto`
    takes 4 where they can be read at full speed: on a CPU, by attention without soft caps or ALiBi; 0 elsewhere.
    0 keeps no such tokens."""

    cold_loss: float | None = Field(default=None, ge=0, le=1)
    """Share of its worth that a token is taken to lose with `cold_bits`; null takes what was measured. The higher, the
    more tokens stay exact and the fewer are kept; with 0 only protected ones do until all are kept."""

    high_watermark: float = Field(default=0.95, gt=0, le=1)
    """Share of the pool in use at which mode `pressure` starts to evict. What is above it is room for copies."""

    low_watermark: float = Field(default=0.9, gt=0, lt=1)
    """Share of the pool in use to which mode `pressure` then evicts. Must be below `high_watermark`."""

    min_tokens: int = Field(default=256, ge=0)
    """Requests shorter than this many tokens are left alone. It bounds `keep_ratio` from below."""

    sink_tokens: int = Field(default=4, ge=0)
    """Tokens at the start of a request that are never evicted. Attention parks unused weight on them."""

    recent_tokens: int = Field(default=8, ge=1)
    """Newest tokens of a request that are never evicted. Must be at least `window`. Every head of every layer keeps
    them, so each more is taken from heads that have use for others."""

    window: int = Field(default=8, ge=1, le=256)
    """How many of the newest queries are remembered per layer to score tokens with."""

    interval: int = Field(default=128, ge=1)
    """Tokens a request may grow beyond its budget while decoding before it is compacted again."""

    scorer: str = Field(default="auto", min_length=1)
    """Which tokens matter: the name of a scorer; `deltamem scorers` lists the installed ones. `auto` takes
    `predictor-tova` where a calibration has a predictor; `tova` where an older calibration says only what heads
    deserve, or all heads get the same; and `distinct`, whose scores say what heads deserve, where there is none."""

    request_scorers: list[str] = []
    """Further scorers that a request may name as `deltamem_scorer` instead of the server's."""

    seed: int = Field(default=0, ge=0)
    """Seed of scorers that draw random numbers (`random`). Others ignore it."""

    dashboard: bool = True
    """Whether the server has the page `/deltamem/dashboard`, and the routes it reads requests from. `/deltamem/stats`
    and `/deltamem/config` are there in any case."""

    @model_validator(mode="after")
    def _recent_covers_window(self) -> DeltaMemConfig:
        if self.recent_tokens < self.window:
            raise ValueError(
                f"recent_tokens={self.recent_tokens} is smaller than window={self.window}, but the queries "
                "that score the cache belong to tokens that must still be in it; "
                f"set recent_tokens to at least {self.window}, or window to at most {self.recent_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _low_is_below_high(self) -> DeltaMemConfig:
        if self.low_watermark >= self.high_watermark:
            raise ValueError(
                f"low_watermark={self.low_watermark} is not below high_watermark={self.high_watermark}, so eviction "
                f"would start again at once; set low_watermark below {self.high_watermark} or raise high_watermark"
            )
        return self

    @model_validator(mode="after")
    def _coverage_has_room(self) -> DeltaMemConfig:
        if self.coverage is None:
            return self
        if self.keep_ratio > self.max_keep_ratio:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} is larger than max_keep_ratio={self.max_keep_ratio}, and coverage keeps "
                f"a share between the two; lower keep_ratio to at most {self.max_keep_ratio} or raise max_keep_ratio"
            )
        if self.dealing == "equal":
            raise ValueError(
                f"coverage={self.coverage} together with dealing='equal': what a number of tokens covers is only known "
                "where pages are dealt; set dealing to 'global' or 'profile', or leave coverage out"
            )
        return self

    @model_validator(mode="after")
    def _profile_has_a_calibration(self) -> DeltaMemConfig:
        if self.dealing == "profile" and self.calibration == "none":
            raise ValueError(
                "dealing='profile' together with calibration='none': the profile is part of the calibration; set "
                "calibration to 'auto' or a path, or dealing to 'global' or 'equal'"
            )
        return self

    @model_validator(mode="after")
    def _cold_pages_are_dealt(self) -> DeltaMemConfig:
        if self.has_cold and self.dealing == "equal":
            raise ValueError(
                f"cold_bits={self.cold_bits} together with dealing='equal': cold pages are dealt to layers and heads "
                "by what they are worth; set dealing to 'global' or 'profile', or cold_bits to 0"
            )
        return self

    @classmethod
    def from_additional_config(cls, additional_config: object) -> DeltaMemConfig:
        """The configuration inside vLLM's ``additional_config``; it must be there (see `is_active`)."""
        if not is_active(additional_config):
            raise ConfigError(
                f"deltamem config: additional_config has no key {CONFIG_KEY!r}, so the policy is off. "
                'Start with --kv-cache-policy deltamem, or LLM(..., additional_config={"deltamem": {}}).'
            )
        assert isinstance(additional_config, Mapping)
        return cls.from_dict(additional_config[CONFIG_KEY])

    @classmethod
    def from_dict(cls, given: object) -> DeltaMemConfig:
        """Build the configuration from the JSON object under `CONFIG_KEY`, the rest from the defaults.

        Raises
        ------
        ConfigError
            One error that names every bad key or value, what is allowed and how to fix it.
        """
        check_fields(given)
        assert isinstance(given, Mapping)
        try:
            return cls(**given)
        except ValidationError as error:
            problems = "; ".join(str(detail["ctx"]["error"]) for detail in error.errors())
            raise ConfigError(f"deltamem config: {problems}.") from error

    def to_json_dict(self) -> dict[str, Any]:
        """The fully resolved configuration as plain JSON values, defaults included."""
        return self.model_dump(mode="json")

    def resolved(self, calibration: str | None, *, predictor: bool, cold: bool = False) -> DeltaMemConfig:
        """The configuration of a server that has looked for a calibration.

        Parameters
        ----------
        calibration
            Folder of the one that was found; None if there is none.
        predictor
            Whether it has weights for the scorers that predict.
        cold
            Whether ``cold_bits`` `auto` means 4 and not 0.
        """
        scorer = self.scorer
        if scorer == AUTO:
            if self.dealing == "equal":
                scorer = "tova"
            elif calibration is None:
                scorer = "distinct"
            else:
                scorer = "predictor-tova" if predictor else "tova"
        bits = self.cold_bits
        if bits == AUTO:
            bits = 4 if cold and self.dealing != "equal" else 0
        return self.model_copy(update={"calibration": calibration or "none", "scorer": scorer, "cold_bits": bits})

    @property
    def has_cold(self) -> bool:
        """Whether pages may be cold. `auto` is not resolved yet before a server starts, and counts as no."""
        return self.cold_bits not in (0, AUTO)

    @property
    def scorers(self) -> tuple[str, ...]:
        """Every scorer that may be used, the server's own first. `auto` is not resolved yet before a server starts."""
        return tuple(dict.fromkeys((self.scorer, *self.request_scorers)))

    def check_scorers(self, available: Iterable[str] | None = None) -> None:
        """Raise `ConfigError` unless every one of `scorers` is installed.

        Separate from construction because the registry imports torch and other packages' entry points.
        """
        if available is None:
            from deltamem_vllm.scoring.registry import available_scorers

            available = available_scorers()
        names = sorted(available)
        for scorer in self.scorers:
            if scorer not in names and not (scorer == AUTO and scorer == self.scorer):
                raise ConfigError(
                    f"deltamem config: unknown scorer {scorer!r}{_nearest(scorer, names)}; "
                    f"available: {', '.join(names)}. `deltamem scorers` describes them; packages add theirs "
                    "through the entry-point group 'deltamem.scorers'."
                )


def is_active(additional_config: object) -> bool:
    """Whether vLLM's ``additional_config`` turns the policy on."""
    return isinstance(additional_config, Mapping) and CONFIG_KEY in additional_config


def check_fields(given: object) -> None:
    """Check names and ranges of single fields; what two fields owe each other needs all of them.

    Used on each ``--deltamem-config`` on its own, so that argparse can say which flag was wrong.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"deltamem config: got {type(given).__name__} {given!r}, expected a JSON object. "
            "Give one like '{\"keep_ratio\": 0.25}', or {} for the defaults."
        )
    fields = DeltaMemConfig.model_fields
    problems = [
        f"unknown key {key!r}{_nearest(str(key), fields)}; valid keys: {', '.join(fields)}"
        for key in given
        if key not in fields
    ]
    try:
        DeltaMemConfig(**{key: value for key, value in given.items() if key in fields})
    except ValidationError as error:
        # Rules between fields have no location; they are for the complete configuration.
        problems += [_describe(detail) for detail in error.errors() if detail["loc"]]
    if problems:
        raise ConfigError("deltamem config: " + "; ".join(problems) + ".")


def field_help() -> list[str]:
    """One line per field: name, type, default and the first sentence of its docstring."""
    return [
        f"{name}: {_type_name(name)} = {_default(name)} [{_allowed(name)}]: {_first_sentence(field.description)}"
        for name, field in DeltaMemConfig.model_fields.items()
    ]


def help_text() -> str:
    """`field_help` as a list that vLLM's argument parser keeps on separate lines."""
    return "\n".join(f"- {line}" for line in field_help())


def _describe(detail: ErrorDetails) -> str:
    name = str(detail["loc"][0])
    return (
        f"{name}: got {detail['input']!r}, allowed: {_type_name(name)}, {_allowed(name)}; "
        f"give such a value or leave it out for the default {_default(name)}"
    )


def _default(name: str) -> str:
    """The default as it is written in a configuration: JSON and YAML say null where Python says None."""
    default = DeltaMemConfig.model_fields[name].default
    return "null" if default is None else repr(default)


def _type_name(name: str) -> str:
    annotation = DeltaMemConfig.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return " or ".join(dict.fromkeys(type(choice).__name__ for choice in get_args(annotation)))
    return str(DeltaMemConfig.__annotations__[name]).replace(" | None", " or null")


def _allowed(name: str) -> str:
    """The range of a field in words, read from its own constraints so that the two cannot differ."""
    if name in _IN_WORDS:
        return _IN_WORDS[name]
    field = DeltaMemConfig.model_fields[name]
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(field.annotation))
    words = []
    for limit in field.metadata:
        if isinstance(limit, Gt):
            words.append(f"> {limit.gt}")
        elif isinstance(limit, Ge):
            words.append(f">= {limit.ge}")
        elif isinstance(limit, Lt):
            words.append(f"< {limit.lt}")
        elif isinstance(limit, Le):
            words.append(f"<= {limit.le}")
    return " and ".join(words)


def _first_sentence(text: str | None) -> str:
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()), maxsplit=1)[0]


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
