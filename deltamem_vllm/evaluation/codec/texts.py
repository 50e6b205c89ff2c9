# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The texts: held-out natural ones to measure with, and those of calibrations to fit on."""

from __future__ import annotations

import random
from typing import Any

from deltamem_vllm.calibration.corpus import draw
from deltamem_vllm.calibration.prompt import Prompt, tokens_of
from deltamem_vllm.evaluation.codec.settings import Settings
from deltamem_vllm.evaluation.texts import passage

_CHARACTERS = 512  # of a passage tokenised at once, at least


def held_out(tokenizer: Any, prompt: Prompt, settings: Settings) -> list[tuple[list[int], list[int]]]:
    """Passages of the evaluation's book: of each the tokens that are coded, and those that go on from there.

    The former begin with what the model's template puts before a text.
    """
    found = []
    for index in range(settings.texts):
        sentences = passage(random.Random(f"codec/{settings.seed}/{index}"), "evaluation")
        text, ids = "", list[int]()
        while len(ids) < settings.tokens + settings.continuation:
            wanted = len(text) + max(_CHARACTERS, 4 * (settings.tokens + settings.continuation - len(ids)))
            while len(text) < wanted:
                text += next(sentences)
            ids = tokens_of(tokenizer, text)
        following = ids[settings.tokens : settings.tokens + settings.continuation]
        found.append(([*prompt.before, *ids[: settings.tokens]], following))
    return found


def to_fit_on(tokenizer: Any, prompt: Prompt, settings: Settings) -> list[list[int]]:
    """Texts of calibrations, of all kinds, none of them of the evaluation."""
    samples = draw(tokenizer, settings.fit_texts, settings.tokens, seed=settings.seed)
    return [[*prompt.before, *sample.tokens] for sample in samples]
