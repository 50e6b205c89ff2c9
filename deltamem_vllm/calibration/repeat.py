# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""One pass over one text: the model reads it, then repeats it, and each entry's attention is recorded.

What a model looks up to repeat its context is what it would look up to answer any question about it; an entry
that no repeated token needs can go. The idea, and the maximum over queries and the query heads of a group, are
those of KVzip (arXiv 2505.23416). Other than there, a query's weights are shares of everything it sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.attention import Recorder
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.predictor import Entries

CHUNK = 512
"""Tokens fed at once, in both halves of the pass: bounds the activations."""
SINKS = 4
"""The first positions of a sequence draw attention whatever they hold, and the policy protects them anyway."""

_MARK = "\u2063deltamem\u2063"
_FIRST = "\n\nRepeat the text above word for word."
_FURTHER = "\n\nRepeat the text above word for word. Go on after: "
# Tokens of the text before a later chunk that the instruction quotes, to say where to go on.
_QUOTED = 8
# Output-head rows at once: logits over a large vocabulary are the largest tensor of the pass.
_LOGIT_ROWS = 64


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


@dataclass(frozen=True)
class Pass:
    """What one text gave.

    Attributes
    ----------
    entries : Entries
        What the model had in its cache when it had read the text, and the largest attention weight of each entry of
        the text, [layers, kv heads, entries] float32. The cache is on the model's device.
    accuracy : float
        Share of the repeated tokens that the model itself would have written.
    """

    entries: Entries
    accuracy: float

    @property
    def peaks(self) -> Tensor:
        """[layers, kv heads, entries] float32: the largest attention weight of each entry of the text."""
        return self.entries.peaks


def prompt_of(tokenizer: Any) -> Prompt:
    """Split the chat template, if there is one, at the user's message."""
    if not getattr(tokenizer, "chat_template", None):
        return Prompt(list(tokenizer("").input_ids), "\n\n", chat=False)
    message = [{"role": "user", "content": _MARK}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, mark, after = text.partition(_MARK)
    if not mark or _MARK in after:
        raise CalibrationError("the chat template does not give the user's message once; calibrate needs it to")
    return Prompt(_tokens(tokenizer, before), after, chat=True)


def longest_pass(tokenizer: Any, prompt: Prompt, context: int) -> int:
    """Positions that the pass over a text of `context` tokens may take, estimated from above."""
    instruction = len(_tokens(tokenizer, _FURTHER + prompt.after))
    # A quoted token may come out as several when its neighbours are gone; four is far above what happens.
    return len(prompt.before) + context + instruction + 4 * _QUOTED + min(CHUNK, context)


@torch.inference_mode()
def repeat_pass(model: Any, tokenizer: Any, recorder: Recorder, prompt: Prompt, context: list[int]) -> Pass:
    """Let the model read and repeat `context`, token ids of a text.

    `model` is a causal language model of transformers that attends through `recorder`. Entries before the text
    and the first `SINKS` of the sequence are not recorded.
    """
    from transformers import DynamicCache

    base, head = model.base_model, model.get_output_embeddings()
    cache = DynamicCache(config=model.config)
    whole = [*prompt.before, *context]
    for start in range(0, len(whole), CHUNK):
        _feed(base, whole[start : start + CHUNK], cache)
    watched = range(max(SINKS, len(prompt.before)), len(whole))
    recorder.start(watched)
    right = 0
    for start in range(0, len(context), CHUNK):
        chunk = context[start : start + CHUNK]
        asked = _FIRST if start == 0 else _FURTHER + tokenizer.decode(context[start - _QUOTED : start])
        instruction = _tokens(tokenizer, asked + prompt.after)
        hidden = _feed(base, [*instruction, *chunk], cache)
        # The state before each repeated token predicts it.
        right += _agreements(head, hidden[0, len(instruction) - 1 : -1], chunk)
        cache.crop(-(len(instruction) + len(chunk)))  # keeps the context
    keys, values = ([getattr(layer, name)[0] for layer in cache.layers] for name in ("keys", "values"))
    return Pass(Entries(keys, values, recorder.finish(), watched), right / len(context))


def _feed(base: Any, tokens: list[int], cache: Any) -> Tensor:
    ids = torch.tensor([tokens], device=base.device)
    hidden: Tensor = base(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
    return hidden


def _agreements(head: Any, hidden: Tensor, tokens: list[int]) -> int:
    pieces = (hidden[start : start + _LOGIT_ROWS] for start in range(0, len(tokens), _LOGIT_ROWS))
    chosen = torch.cat([head(states).argmax(-1).cpu() for states in pieces])
    return int((chosen == torch.tensor(tokens)).sum())


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
