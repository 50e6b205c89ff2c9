# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What one request may say about its own KV memory.

A client sends flat keys in ``vllm_xargs`` of the OpenAI body; they arrive in ``SamplingParams.extra_args``.
The API server checks them before a request is queued and the scheduler reads them again: one parser, so
both agree. Imports neither torch nor vllm.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deltamem_vllm.config import DeltaMemConfig

PREFIX = "deltamem"
"""Every extra argument that starts so is ours, and refused when we do not know it."""

POLICY = "deltamem_policy"
MODE = "deltamem_mode"
KEEP_RATIO = "deltamem_keep_ratio"
KEEP_TOKENS = "deltamem_keep_tokens"
COVERAGE = "deltamem_coverage"
DEALING = "deltamem_dealing"
MIN_TOKENS = "deltamem_min_tokens"
SCORER = "deltamem_scorer"
COLD = "deltamem_cold"
KEYS = (POLICY, MODE, KEEP_RATIO, KEEP_TOKENS, COVERAGE, DEALING, MIN_TOKENS, SCORER, COLD)

MODES = ("pressure", "always")
DEALINGS = ("global", "profile", "equal")


class RequestOptionError(ValueError):
    """A per-request option that cannot be honoured. `key` names it, `value` is what was given."""

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key}: got {value!r}, allowed: {allowed}")
        self.key = key
        self.value = value


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What the policy does with one request.

    Parameters
    ----------
    enabled
        False leaves the request alone: its KV cache is never evicted.
    mode
        ``pressure``: evicted only as the pool fills; ``always``: held to its budget.
    keep_ratio
        Share of the request's tokens that stays resident, in (0, 1]; unused if ``keep_tokens`` is given.
    keep_tokens
        Tokens that stay resident, at least 1; None for the share.
    coverage
        Share of the request's utility to keep, in (0, 1]; None to keep a fixed number of tokens.
    dealing
        How its pages are shared among layers and heads: ``global``, ``profile`` or ``equal``.
    min_tokens
        The request is left alone while it is shorter than this many tokens.
    scorer
        Name of the scorer that chooses its tokens.
    cold
        Whether some of its tokens may be written in fewer bits.
    """

    enabled: bool
    mode: str
    keep_ratio: float
    keep_tokens: int | None
    coverage: float | None
    dealing: str
    min_tokens: int
    scorer: str
    cold: bool

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None, config: DeltaMemConfig) -> RequestOptions:
        """Read the options of a request; what it does not say comes from `config`.

        Raises
        ------
        RequestOptionError
            An unknown key that starts with `PREFIX`, a value out of range, or keys that exclude each other.
        """
        given = own_args(extra_args)
        for key, value in given.items():
            if key not in KEYS:
                close = difflib.get_close_matches(key, KEYS, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise RequestOptionError(key, value, f"one of the keys {', '.join(KEYS)}{hint}")
        options = cls(
            enabled=_one_of(POLICY, given.get(POLICY, "on"), ("on", "off")) == "on",
            mode=_one_of(MODE, given.get(MODE, config.mode), MODES),
            keep_ratio=_share(KEEP_RATIO, given.get(KEEP_RATIO, config.keep_ratio)),
            keep_tokens=_keep_tokens(given, config),
            coverage=_coverage(given, config),
            dealing=_one_of(DEALING, given.get(DEALING, config.dealing), DEALINGS),
            min_tokens=_whole(MIN_TOKENS, given.get(MIN_TOKENS, config.min_tokens), least=0),
            scorer=_scorer(given.get(SCORER, config.scorer), config),
            cold=_cold(given, config),
        )
        options._check_together(given, config)
        return options

    def _check_together(self, given: Mapping[str, Any], config: DeltaMemConfig) -> None:
        """The rules between fields; a server's own settings keep them, so some key of the request breaks them."""
        if self.dealing != "equal" and config.dealing == "equal":
            raise RequestOptionError(DEALING, self.dealing, "'equal' on this server, which has dealing='equal'")
        if self.dealing == "profile" and config.calibration == "none":
            raise RequestOptionError(DEALING, self.dealing, "'global' or 'equal': this server has no calibration")
        if self.coverage is None:
            return
        if self.dealing == "equal":
            if COVERAGE in given:
                raise RequestOptionError(COVERAGE, given[COVERAGE], f"'off' where {DEALING} is 'equal'")
            raise RequestOptionError(
                DEALING,
                self.dealing,
                f"'global' or 'profile' on this server, which has coverage={self.coverage}; or send {COVERAGE} 'off'",
            )
        if self.keep_tokens is None and self.keep_ratio > config.max_keep_ratio:
            raise RequestOptionError(
                KEEP_RATIO if KEEP_RATIO in given else COVERAGE,
                given.get(KEEP_RATIO, self.coverage),
                f"with coverage, a {KEEP_RATIO} of at most this server's max_keep_ratio={config.max_keep_ratio}",
            )


def own_args(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The extra arguments of a request that are meant for this policy."""
    return {key: value for key, value in (extra_args or {}).items() if key.startswith(PREFIX)}


def _one_of(key: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise RequestOptionError(key, value, " or ".join(repr(choice) for choice in choices))
    return value


def _share(key: str, value: object, otherwise: str = "") -> float:
    # bool is an int in Python; JSON true is a mistake here, not a ratio of 1.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not 0 < value <= 1:
        raise RequestOptionError(key, value, f"a number > 0 and <= 1{otherwise}")
    return float(value)


def _whole(key: str, value: object, least: int) -> int:
    # JSON has one number type and vLLM's xargs may hand an integer over as a float.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestOptionError(key, value, f"a whole number >= {least}")
    return value


def _keep_tokens(given: Mapping[str, Any], config: DeltaMemConfig) -> int | None:
    if KEEP_TOKENS in given:
        if KEEP_RATIO in given:
            raise RequestOptionError(
                KEEP_TOKENS, given[KEEP_TOKENS], f"either it or {KEEP_RATIO} ({given[KEEP_RATIO]!r}), not both"
            )
        return _whole(KEEP_TOKENS, given[KEEP_TOKENS], least=1)
    # A request that asks for a share means it, also where the server's default is a number of tokens.
    return None if KEEP_RATIO in given else config.keep_tokens


def _coverage(given: Mapping[str, Any], config: DeltaMemConfig) -> float | None:
    # Extra arguments cannot be null, so the server's coverage is switched off by a word.
    if COVERAGE not in given:
        return config.coverage
    return None if given[COVERAGE] == "off" else _share(COVERAGE, given[COVERAGE], " or 'off'")


def _cold(given: Mapping[str, Any], config: DeltaMemConfig) -> bool:
    if COLD not in given:
        # Cold pages are dealt; a request that wants equal counts wants none.
        return config.has_cold and given.get(DEALING) != "equal"
    wanted = _one_of(COLD, given[COLD], ("on", "off")) == "on"
    if wanted and not config.has_cold:
        raise RequestOptionError(COLD, given[COLD], "'off' on this server, which has cold_bits=0")
    if wanted and given.get(DEALING) == "equal":
        raise RequestOptionError(COLD, given[COLD], f"'off' where {DEALING} is 'equal'")
    return wanted


def _scorer(value: object, config: DeltaMemConfig) -> str:
    if not isinstance(value, str) or value not in config.scorers:
        names = ", ".join(config.scorers)
        raise RequestOptionError(SCORER, value, f"one of the server's scorers ({names}); its request_scorers adds more")
    return value
