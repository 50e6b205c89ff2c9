# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""KVzip as a reference: what its second pass over a prompt says, for vLLM to compact with.

The model reads the prompt once more, offline, and repeats it; the most that any repeated token looks at an entry is the
entry's score. No server could afford that for each request, so the scorer exists in the evaluation's engines alone.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltamem_vllm.calibration.repeat import CHUNK, prompt_of
from deltamem_vllm.evaluation.eval.grid import KVZIP
from deltamem_vllm.evaluation.eval.kvzip_attention import WatchedAttention
from deltamem_vllm.scoring.base import Scorer, ScoreView
from deltamem_vllm.scoring.registry import BUILTIN

_FIRST = "\n\nRepeat the text above word for word."
_FURTHER = "\n\nRepeat the text above word for word. Go on after: "
# Tokens before a later chunk that the instruction quotes, to say where to go on.
_QUOTED = 8
# Ratings remembered for each first pass, of all settings of a sample and of samples that began since. They are small.
_RATED = 8
# A cache that shares less than this with a prompt is another sample's.
_LEAST_SHARED = 0.5


class KVzipScorer(Scorer):
    """Scores that were worked out before: those of `Rater`, of the request that is being compacted.

    The evaluation's engine says which request that is; a scorer is not told.
    """

    name = KVZIP
    summary = "the attention of a second pass that repeats the prompt; a reference, in the evaluation only"
    source = "KVzip, arXiv 2505.23416"
    comparable = True
    profiled = False  # KVzip has no profile of the model: its scores are all it goes by

    scores: ClassVar[Tensor | None] = None
    """[layers, kv heads, entries] float32 of the request that is being compacted."""

    def score(self, view: ScoreView) -> Tensor:
        scores = KVzipScorer.scores
        if scores is None:
            raise ValueError("scorer 'kvzip' rates nothing by itself: it is a reference of `deltamem eval`")
        if view.num_resident != scores.shape[2]:
            raise ValueError(
                f"kvzip rated a prompt of {scores.shape[2]} tokens, but {view.num_resident} entries are to be judged; "
                "it knows nothing of decoded tokens: raise the grid's policy.interval above what is decoded"
            )
        heads = slice(view.first_head, view.first_head + view.num_kv_heads)
        return scores[view.layer, heads].to(view.keys.device)


def register() -> None:
    """Make the scorer known by its name, in this process."""
    BUILTIN[KVZIP] = f"{__name__}:{KVzipScorer.__name__}"


class Rater:
    """Works the scores of prompts out, with a model of its own.

    Parameters
    ----------
    model
        A folder or Hugging Face id.
    device
        Where to compute.
    keep
        Prompts of which the first pass is kept, for other prompts that begin like them: all settings of a sample do.
        At least the samples that are worked on side by side.
    """

    def __init__(self, model: str, device: str, keep: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self._attention = WatchedAttention()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        # Half the time of float32 on a CPU. Weights are shares in float32 all the same.
        network: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16, attn_implementation=self._attention.register()
        )
        self._base = network.base_model.eval().to(device)
        frame = prompt_of(self._tokenizer)
        self._before, self._after, self._chat = frame.before, frame.after, frame.chat
        self._keep = keep
        self._read: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._known: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def rate(self, prompt: tuple[int, ...]) -> Tensor:
        """Scores of a prompt's entries.

        Parameters
        ----------
        prompt
            The token ids that vLLM is given, with whatever chat template they are in.

        Returns
        -------
        Tensor
            [layers, kv heads, len(prompt)] float32 on the CPU: the largest share of a query's attention, of the
            repeated tokens and the query heads of the group.
        """
        found = self._known.pop(prompt, None)
        if found is None:
            found = self._second_pass(prompt)
        self._known[prompt] = found
        if len(self._known) > _RATED * self._keep:
            self._known.popitem(last=False)
        return found

    @torch.inference_mode()
    def _second_pass(self, prompt: tuple[int, ...]) -> Tensor:
        cache = self._first_pass(prompt)
        message = message_of(prompt, self._before, self._tokens(self._after)) if self._chat else range(len(prompt))
        in_chat = self._chat and message.start > 0
        after = self._after if in_chat else "\n\n"
        text = list(prompt[message.start : message.stop])
        self._attention.watch(len(prompt))
        for start in range(0, len(text), CHUNK):
            quoted = self._tokenizer.decode(text[max(start - _QUOTED, 0) : start])
            asked = self._tokens((_FURTHER + quoted if start else _FIRST) + after)
            chunk = text[start : start + CHUNK]
            self._feed([*asked, *chunk], cache)
            cache.crop(-(len(asked) + len(chunk)))  # keeps the prompt
        return self._attention.peaks()

    def _first_pass(self, prompt: tuple[int, ...]) -> Any:
        """The prompt's cache, taken over from a prompt that begins in the same way if there is one."""
        from transformers import DynamicCache

        nearest = max(self._read, key=lambda other: shared_prefix(other, prompt), default=())
        shared = shared_prefix(nearest, prompt)
        if shared < _LEAST_SHARED * len(prompt):
            cache, shared = DynamicCache(config=self._base.config), 0
        else:
            cache = self._read.pop(nearest)
            if shared < len(nearest):
                cache.crop(shared - len(nearest))
        for start in range(shared, len(prompt), CHUNK):
            self._feed(list(prompt[start : start + CHUNK]), cache)
        self._read[prompt] = cache
        if len(self._read) > self._keep:
            self._read.popitem(last=False)
        return cache

    def _feed(self, tokens: list[int], cache: Any) -> None:
        ids = torch.tensor([tokens], device=self._base.device)
        self._base(input_ids=ids, past_key_values=cache, use_cache=True)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def message_of(prompt: tuple[int, ...], before: list[int], after: list[int]) -> range:
    """The positions of the user's message in a prompt: what is left of it inside the chat template, if it has one.

    Parameters
    ----------
    before, after
        The template's tokens in front of the message and up to the answer. A prompt that was cut behind its context
        has only the former.
    """
    if not before or list(prompt[: len(before)]) != before:
        return range(len(prompt))
    ends = bool(after) and list(prompt[-len(after) :]) == after
    return range(len(before), len(prompt) - len(after) * ends)


def shared_prefix(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Tokens that two prompts begin with in common."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
