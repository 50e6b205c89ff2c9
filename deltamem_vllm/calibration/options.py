# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What can be chosen about a calibration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deltamem_vllm.calibration.corpus import KINDS, plan
from deltamem_vllm.calibration.errors import CalibrationError

SAMPLES = 16
TOKENS = 2048
TARGET = "both"
TARGETS = {
    "repeat": "while the model repeats the text",
    "answers": "while the model answers questions about the text and goes on with it",
    "both": "the geometric mean of the two",
}
"""What an entry's worth is: the most attention it gets ..."""


@dataclass(frozen=True)
class Options:
    """What decides, with the model, what comes out.

    Attributes
    ----------
    samples : int
        Texts to learn from.
    tokens : int
        Of each text.
    kinds : tuple of str
        Kinds of text, of `corpus.KINDS`.
    target : str
        One of `TARGETS`.
    seed : int
        Of the texts, at least 0.

    Raises
    ------
    CalibrationError
        One of them is out of range.
    """

    samples: int = SAMPLES
    tokens: int = TOKENS
    kinds: tuple[str, ...] = KINDS
    target: str = TARGET
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.tokens < 1 or self.seed < 0:
            raise CalibrationError(
                f"got {self.samples} samples of {self.tokens} tokens and seed {self.seed}; samples and tokens must be "
                "at least 1, the seed at least 0"
            )
        if self.target not in TARGETS:
            raise CalibrationError(f"unknown target {self.target!r}; there are {', '.join(TARGETS)}")
        plan(self.samples, self.kinds, self.seed)  # for its check of the kinds

    def as_json(self) -> dict[str, Any]:
        """For the card."""
        return {**asdict(self), "kinds": list(self.kinds)}
