# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A text in a model's cache, and what the model does with it, while the attention that the text gets is recorded.

Whatever follows the text is taken out of the cache again, so that one text can be put to many uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.attention import Recorder
from deltamem_vllm.calibration.prompt import Prompt, tokens_of

CHUNK = 512
"""Tokens fed at once: bounds the activations."""
SINKS = 4
"""The first positions of a sequence draw attention whatever they hold, and the policy protects them anyway."""

# Output-head rows at once: logits over a large vocabulary are the largest tensor of all.
_LOGIT_ROWS = 64


class Recorded:
    """What was recorded in a block.

    Attributes
    ----------
    peaks : Tensor
        [layers, kv heads, watched] float32 on the CPU: the largest share of a query's attention.
    """

    peaks: Tensor


class Reading:
    """What a model has in its cache when it has read a text.

    Parameters
    ----------
    model
        A causal language model of transformers that attends through `recorder`.
    tokenizer
        Its tokenizer.
    recorder : Recorder
        Records while asked to.
    prompt : Prompt
        The tokens around the text.
    context : list of int
        Token ids of the text.

    Attributes
    ----------
    watched : range
        Positions of the text, without the first `SINKS` of the sequence.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, tokenizer: Any, recorder: Recorder, prompt: Prompt, context: list[int]) -> None:
        from transformers import DynamicCache

        self.tokenizer, self.context = tokenizer, context
        self._base, self._head = model.base_model, model.get_output_embeddings()
        self._recorder, self._prompt = recorder, prompt
        self._ends = _ends_of(model)
        self._cache = DynamicCache(config=model.config)
        whole = [*prompt.before, *context]
        self.watched = range(max(SINKS, len(prompt.before)), len(whole))
        for start in range(0, len(whole), CHUNK):
            self._feed(whole[start : start + CHUNK])

    @property
    def keys(self) -> list[Tensor]:
        """By layer, [kv heads, n, D], after RoPE; with the tokens before the text."""
        return [layer.keys[0] for layer in self._cache.layers]

    @property
    def values(self) -> list[Tensor]:
        """By layer, [kv heads, n, D_v]."""
        return [layer.values[0] for layer in self._cache.layers]

    @contextmanager
    def recorded(self) -> Iterator[Recorded]:
        """Record the text's attention in the block; what comes out is there when the block has ended."""
        self._recorder.start(self.watched)
        found = Recorded()
        yield found
        found.peaks = self._recorder.finish()

    @torch.inference_mode()
    def forced(self, request: str, answer: list[int]) -> int:
        """Ask for something after the text and let the model answer with these tokens.

        Returns how many of them the model itself would have written.
        """
        asked = self.request(request)
        hidden = self._feed([*asked, *answer])
        # The state before each token predicts it.
        right = self._agreements(hidden[0, len(asked) - 1 : -1], answer)
        self._forget(len(asked) + len(answer))
        return right

    @torch.inference_mode()
    def written(self, request: str, most: int) -> list[int]:
        """Ask for something after the text and let the model write, greedily, at most so many tokens; return them."""
        asked = self.request(request)
        hidden = self._feed(asked)
        tokens: list[int] = []
        while len(tokens) < most:
            token = int(self._head(hidden[0, -1:]).argmax())
            if token in self._ends:
                break
            tokens.append(token)
            hidden = self._feed([token])
        self._forget(len(asked) + len(tokens))
        return tokens

    def request(self, text: str) -> list[int]:
        """Tokens of a request after the text, up to the beginning of the answer."""
        return tokens_of(self.tokenizer, text + self._prompt.after)

    def _feed(self, tokens: list[int]) -> Tensor:
        ids = torch.tensor([tokens], device=self._base.device)
        hidden: Tensor = self._base(input_ids=ids, past_key_values=self._cache, use_cache=True).last_hidden_state
        return hidden

    def _forget(self, tokens: int) -> None:
        self._cache.crop(-tokens)

    def _agreements(self, hidden: Tensor, tokens: list[int]) -> int:
        pieces = (hidden[start : start + _LOGIT_ROWS] for start in range(0, len(tokens), _LOGIT_ROWS))
        chosen = torch.cat([self._head(states).argmax(-1).cpu() for states in pieces])
        return int((chosen == torch.tensor(tokens)).sum())


def _ends_of(model: Any) -> set[int]:
    """Tokens that end an answer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, list) else {int(ends)}
