# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What generators yield and what a sample of the corpus is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Ask(NamedTuple):
    """A question about a text, and its answer as it stands in the text."""

    question: str
    answer: str


class Unit(NamedTuple):
    """A piece of text, with the white space that follows it, and what can be asked about it alone."""

    text: str
    asks: tuple[Ask, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A text, and questions that it answers.

    Attributes
    ----------
    text : str
        ASCII.
    questions : tuple of Ask
        Pairs (question, answer), in the order of the text.
    ends : tuple of int
        For each question, how many characters of the text it takes to answer it.
    """

    text: str
    questions: tuple[Ask, ...]
    ends: tuple[int, ...]

    def spread(self, count: int) -> Sample:
        """The same text with at most `count` of its questions, evenly spread over them."""
        total = len(self.questions)
        chosen = range(total) if total <= count else [(2 * i + 1) * total // (2 * count) for i in range(count)]
        return Sample(self.text, tuple(self.questions[i] for i in chosen), tuple(self.ends[i] for i in chosen))
