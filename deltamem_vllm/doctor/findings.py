# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

Level = Literal["ok", "note", "warning", "error"]

LEVELS: Final[tuple[Level, ...]] = ("ok", "note", "warning", "error")
"""In rising order. note: good to know; warning: works, but not as it could; error: will not work."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Parameters
    ----------
    check
        Name of the check.
    level
        One of `LEVELS`.
    found
        What is the case.
    mend
        What to do about it; empty only where nothing has to be done.
    """

    check: str
    level: Level
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        if self.level in ("warning", "error") and not self.mend:
            raise ValueError(f"a finding of level {self.level!r} says how to mend it: {self.check}: {self.found}")


def worst(findings: Iterable[Finding]) -> Level:
    """The highest level among them; ``ok`` if there are none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def passed(findings: Iterable[Finding], strict: bool) -> bool:
    """Whether nothing is wrong: no error, and with ``strict`` no warning either."""
    return LEVELS.index(worst(findings)) < LEVELS.index("warning" if strict else "error")
