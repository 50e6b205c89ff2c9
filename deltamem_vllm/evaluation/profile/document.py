# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`profile.json`: everything the pictures and the summary are made from.

`docs/guides/profile.md` describes the fields for readers; `VERSION` rises when one changes its meaning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile import compaction_json
from deltamem_vllm.evaluation.profile.dealt import Dealt
from deltamem_vllm.evaluation.profile.errors import ProfileError
from deltamem_vllm.evaluation.profile.held import Held, held_after, lengths_before
from deltamem_vllm.evaluation.profile.packing import Scale, from_codes, to_codes, utility_scale
from deltamem_vllm.evaluation.profile.ragged import Ragged
from deltamem_vllm.evaluation.profile.recording import Compaction, Step

FORMAT = "deltamem-profile"
VERSION = 3


class Mark(TypedDict):
    """A passage of the prompt to point out: tokens `start` to `stop - 1`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Profile:
    """A finished profile.

    Parameters
    ----------
    conditions
        Command, model, machine, code.
    engine
        Facts of the engine, the whole policy among them.
    prompt
        Source, number of tokens, marks; with a built-in question also the question, the reply and whether it is right.
    steps, compactions
        As recorded.
    counters
        The policy's own counters at the end.
    codes, scale
        [L, H_kv, n] utilities at the first compaction, see `packing`.
    dealt
        `done` is what the engine did, the others deal the same memory to exact tokens only: `equal` the same to every
        head, `by_utility` and `by_attention` by one ranking over all layers and heads.
    """

    conditions: Mapping[str, Any]
    engine: Mapping[str, Any]
    prompt: Mapping[str, Any]
    steps: Sequence[Step]
    compactions: Sequence[Compaction]
    counters: Mapping[str, Any]
    codes: NDArray[np.int16]
    scale: Scale
    dealt: Mapping[str, Dealt]

    @property
    def scorer(self) -> str:
        """Name of the scorer that chose."""
        return str(self.compactions[0].facts["scorer"])

    @property
    def dealing(self) -> str:
        """How the engine shared the memory among layers and heads: `global`, `profile` or `equal`."""
        return str(self.compactions[0].facts["dealing"])

    @property
    def marks(self) -> Sequence[Mark]:
        """Passages to point out."""
        marks: Sequence[Mark] = self.prompt["marks"]
        return marks

    @cached_property
    def utility(self) -> NDArray[np.float32]:
        """[L, H_kv, n] as the scorer gave it, to the precision of the codes."""
        return from_codes(self.codes, self.scale)

    @property
    def tiered(self) -> bool:
        """Whether pages could be cold."""
        return any(compaction.coded is not None for compaction in self.compactions)

    @property
    def block_tokens(self) -> int:
        """Exact tokens of a block, and of a page."""
        return int(self.engine["block_tokens"])

    @cached_property
    def held(self) -> Sequence[Held]:
        """Logical positions of what each (layer, kv head) held after each compaction, exactly and coded."""
        return held_after(self.compactions, self.block_tokens)

    @cached_property
    def positions_at_end(self) -> Ragged:
        """Of each (layer, kv head), logical positions of the exact tokens after the last step."""
        since = int(self.compactions[-1].facts["logical_len"])
        return self.held[-1].exact.followed_by(since, self.steps[-1]["logical_tokens"])

    @cached_property
    def exact_at_end(self) -> NDArray[np.bool_]:
        """[L, H_kv, tokens] whether a token was there exactly after the last step."""
        return self.positions_at_end.mask(self.steps[-1]["logical_tokens"])

    @cached_property
    def coded_at_end(self) -> NDArray[np.bool_]:
        """[L, H_kv, tokens] whether a token was there coded after the last step."""
        return self.held[-1].coded.mask(self.steps[-1]["logical_tokens"])

    def hot_pages(self, compaction: int) -> NDArray[np.int64]:
        """[L, H_kv] pages of exact tokens that one compaction left each head; the last may be part empty."""
        return -(-self.compactions[compaction].survivors.counts // self.block_tokens)

    def cold_pages(self, compaction: int) -> NDArray[np.int64]:
        """[L, H_kv] pages of coded tokens, new ones and old ones, that one compaction left each head."""
        coded = self.compactions[compaction].coded
        return np.zeros_like(self.hot_pages(compaction)) if coded is None else coded.pages

    def pages(self, compaction: int) -> NDArray[np.int64]:
        """[L, H_kv] pages that one compaction left each head, hot and cold."""
        return self.hot_pages(compaction) + self.cold_pages(compaction)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "conditions": dict(self.conditions),
            "engine": dict(self.engine),
            "prompt": dict(self.prompt),
            "counters": dict(self.counters),
            "steps": {field: [step[field] for step in self.steps] for field in Step.__annotations__},  # type: ignore[literal-required]
            "compactions": [
                compaction_json.to_json(compaction, lengths)
                for compaction, lengths in zip(
                    self.compactions, lengths_before(self.compactions, self.block_tokens), strict=True
                )
            ],
            "dealt": {name: one.to_json() for name, one in self.dealt.items()},
            "utility": {"scale": dict(self.scale), "codes": self.codes.tolist()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError for what is none."""
        steps = data["steps"]
        rows = zip(*(steps[field] for field in Step.__annotations__), strict=True)
        return cls(
            conditions=data["conditions"],
            engine=data["engine"],
            prompt=data["prompt"],
            counters=data["counters"],
            steps=[Step(**dict(zip(Step.__annotations__, row, strict=True))) for row in rows],  # type: ignore[typeddict-item]
            compactions=[compaction_json.from_json(one) for one in data["compactions"]],
            dealt={name: Dealt.from_json(one) for name, one in data["dealt"].items()},
            scale=data["utility"]["scale"],
            codes=np.array(data["utility"]["codes"], dtype=np.int16),
        )


def encode_utility(utility: NDArray[np.float32]) -> tuple[NDArray[np.int16], Scale]:
    """Codes and their scale, for a new profile."""
    scale = utility_scale(utility)
    return to_codes(utility, scale), scale


def write_profile(profile: Profile, path: Path) -> None:
    """Write `profile.json`: one top-level field a line, arrays without spaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [
        f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in profile.to_json().items()
    ]
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")


def read_profile(path: Path) -> Profile:
    """Read what `write_profile` wrote.

    Raises
    ------
    ProfileError
        The file is missing, is no profile, or has another version.
    """
    again = "make it again with `deltamem profile`"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror}; give the profile.json of an earlier run") from error
    except ValueError as error:
        raise ProfileError(f"{path} is no JSON ({error}); give the profile.json of an earlier run") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProfileError(f"{path} is no profile (its format is not {FORMAT!r}); give that of an earlier run")
    if data.get("version") != VERSION:
        raise ProfileError(f"{path} has version {data.get('version')}, this deltamem reads {VERSION}; {again}")
    try:
        profile = Profile.from_json(data)
        _ = profile.positions_at_end
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ProfileError(f"{path} is damaged ({type(error).__name__}: {error}); {again}") from error
    return profile
