# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The model uses a text that it has read: it answers questions about it, and goes on writing.

Answers are given to it, so that a model that would get them wrong looks at what it should have looked at. How it goes
on is its own greedy choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltamem_vllm.calibration.corpus import Ask
from deltamem_vllm.calibration.prompt import Prompt, tokens_of
from deltamem_vllm.calibration.reading import Reading

WRITTEN = 64
"""Most tokens that the model goes on for."""

_GO_ON = "\n\nGo on with the text above where it ends."


def use(reading: Reading, questions: Sequence[Ask]) -> float | None:
    """Let the model answer the questions and go on with the text.

    Returns the share of the answers' tokens that the model itself would have written; None if there is no question.
    """
    right, total = 0, 0
    for question, answer in questions:
        tokens = tokens_of(reading.tokenizer, answer)
        right, total = right + reading.forced(_asked(question), tokens), total + len(tokens)
    reading.written(_GO_ON, WRITTEN)
    return right / total if total else None


def longest_use(tokenizer: Any, prompt: Prompt, questions: Sequence[Ask]) -> int:
    """Positions after a text that `use` takes at most."""
    asked = (
        len(tokens_of(tokenizer, _asked(question) + prompt.after)) + len(tokens_of(tokenizer, answer))
        for question, answer in questions
    )
    return max([len(tokens_of(tokenizer, _GO_ON + prompt.after)) + WRITTEN, *asked])


def _asked(question: str) -> str:
    return f"\n\n{question}"
