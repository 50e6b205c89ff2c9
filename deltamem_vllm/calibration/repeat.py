# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The model repeats a text that it has read.

What a model looks up to repeat its context is what it would look up to answer any question about it; an entry
that no repeated token needs can go. The idea, and the maximum over queries and the query heads of a group, are
those of KVzip (arXiv 2505.23416). Other than there, a query's weights are shares of everything it sees.
"""

from __future__ import annotations

from typing import Any

from deltamem_vllm.calibration.prompt import Prompt as Prompt
from deltamem_vllm.calibration.prompt import prompt_of as prompt_of
from deltamem_vllm.calibration.prompt import tokens_of
from deltamem_vllm.calibration.reading import CHUNK as CHUNK
from deltamem_vllm.calibration.reading import Reading

_FIRST = "\n\nRepeat the text above word for word."
_FURTHER = "\n\nRepeat the text above word for word. Go on after: "
# Tokens of the text before a later chunk that the instruction quotes, to say where to go on.
_QUOTED = 8


def repeat(reading: Reading, chunk: int = CHUNK) -> float:
    """Let the model repeat its text, `chunk` tokens at a time.

    Returns the share of the tokens that the model itself would have written.
    """
    context, right = reading.context, 0
    for start in range(0, len(context), chunk):
        asked = _FIRST if start == 0 else _FURTHER + reading.tokenizer.decode(context[start - _QUOTED : start])
        right += reading.forced(asked, context[start : start + chunk])
    return right / len(context)


def longest_repetition(tokenizer: Any, prompt: Prompt, context: int) -> int:
    """Positions after a text of `context` tokens that `repeat` may take, estimated from above."""
    instruction = len(tokens_of(tokenizer, _FURTHER + prompt.after))
    # A quoted token may come out as several when its neighbours are gone; four is far above what happens.
    return instruction + 4 * _QUOTED + min(CHUNK, context)
