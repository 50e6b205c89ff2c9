# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What stands around a text: the chat template, if there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deltamem_vllm.calibration.errors import CalibrationError

_MARK = "\u2063deltamem\u2063"


@dataclass(frozen=True)
class Prompt:
    """The tokens around a text.

    Attributes
    ----------
    before : list of int
        Of the chat template before the user's message, or of a beginning-of-sequence token; may be empty.
    after : str
        The chat template from the end of the user's message to the beginning of the answer; may be empty.
    chat : bool
        Whether the tokenizer has a chat template.
    """

    before: list[int]
    after: str
    chat: bool


def prompt_of(tokenizer: Any) -> Prompt:
    """Split the chat template, if there is one, at the user's message."""
    if not getattr(tokenizer, "chat_template", None):
        return Prompt(list(tokenizer("").input_ids), "\n\n", chat=False)
    message = [{"role": "user", "content": _MARK}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, mark, after = text.partition(_MARK)
    if not mark or _MARK in after:
        raise CalibrationError("the chat template does not give the user's message once; calibrate needs it to")
    return Prompt(tokens_of(tokenizer, before), after, chat=True)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without any special tokens that are not written in it."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)
