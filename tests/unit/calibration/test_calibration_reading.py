# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A model reads, repeats and uses a text: what is recorded agrees with whole forwards of another implementation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltamem_vllm.calibration.attention import NAME, Recorder
from deltamem_vllm.calibration.corpus import Ask, TokenSample, token_sample
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.predictor import target_of
from deltamem_vllm.calibration.prompt import Prompt, prompt_of
from deltamem_vllm.calibration.reading import SINKS, Reading
from deltamem_vllm.calibration.repeat import repeat
from deltamem_vllm.calibration.targets import observe, positions
from deltamem_vllm.calibration.use import WRITTEN
from tests.support.tiny_models import FAMILIES, KV_HEADS, LAYERS

Tiny = Callable[[str], Path]


class Eager:
    """The same model with transformers' own attention, without a cache."""

    def __init__(self, folder: Path, prompt: Prompt, context: list[int]) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.whole = [*prompt.before, *context]
        self.watched = slice(max(SINKS, len(prompt.before)), len(self.whole))
        self.peaks = torch.zeros(LAYERS, KV_HEADS, self.watched.stop - self.watched.start)

    @torch.inference_mode()
    def look(self, tokens: list[int]) -> Tensor:
        """Take the attention of these tokens after the text; returns what would be written after each of them."""
        seen = self.model(torch.tensor([[*self.whole, *tokens]]), output_attentions=True)
        for layer, weights in enumerate(seen.attentions):
            rows = weights[0, :, len(self.whole) :, self.watched].unflatten(0, (KV_HEADS, -1))
            self.peaks[layer] = torch.maximum(self.peaks[layer], rows.amax((1, 2)))
        chosen: Tensor = seen.logits[0, len(self.whole) :].argmax(-1)
        return chosen


def load(folder: Path) -> tuple[Any, Any, Recorder, Prompt]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recorder = Recorder()
    recorder.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME).eval()
    return model, tokenizer, recorder, prompt_of(tokenizer)


def asked(tokenizer: Any, prompt: Prompt, text: str) -> list[int]:
    """A request: after the user's message comes the end of it and the beginning of the answer."""
    end = "<|end|><|assistant|>" if prompt.chat else "\n\n"
    return list(tokenizer(text + end, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_repeating_agrees_with_whole_forwards_without_a_cache(tiny: Tiny, family: str) -> None:
    folder = tiny(family)
    model, tokenizer, recorder, prompt = load(folder)
    assert prompt.chat == (family != "mistral")
    context = token_sample(tokenizer, "novel", 0, 120).tokens
    reading = Reading(model, tokenizer, recorder, prompt, context)
    with reading.recorded() as found:
        share = repeat(reading, chunk=50)
    eager, right = Eager(folder, prompt, context), 0
    for start in (0, 50, 100):
        text = "\n\nRepeat the text above word for word."
        if start:
            text += f" Go on after: {tokenizer.decode(context[start - 8 : start])}"
        request, chunk = asked(tokenizer, prompt, text), context[start : start + 50]
        chosen = eager.look([*request, *chunk])
        right += int((chosen[len(request) - 1 : -1] == torch.tensor(chunk)).sum())
    torch.testing.assert_close(found.peaks, eager.peaks, atol=1e-5, rtol=1e-4)
    assert share == right / len(context)


@pytest.mark.parametrize("family", FAMILIES)
def test_using_agrees_with_whole_forwards_without_a_cache(tiny: Tiny, family: str) -> None:
    folder = tiny(family)
    model, tokenizer, recorder, prompt = load(folder)
    sample = token_sample(tokenizer, "list", 0, 300)
    assert len(sample.questions) >= 2
    seen = observe(model, tokenizer, recorder, prompt, sample, "answers")
    eager, right, total = Eager(folder, prompt, sample.tokens), 0, 0
    for question, answer in sample.questions:
        request = asked(tokenizer, prompt, f"\n\n{question}")
        given = list(tokenizer(answer, add_special_tokens=False).input_ids)
        chosen = eager.look([*request, *given])
        right += int((chosen[len(request) - 1 : -1] == torch.tensor(given)).sum())
        total += len(given)
    request = asked(tokenizer, prompt, "\n\nGo on with the text above where it ends.")
    written: list[int] = []
    while len(written) < WRITTEN:
        token = int(eager.look([*request, *written])[-1])
        if token == 1:  # the end of an answer
            break
        written.append(token)
    if len(written) == WRITTEN:
        eager.look([*request, *written])
    torch.testing.assert_close(seen.peaks["answers"], eager.peaks, atol=1e-5, rtol=1e-4)
    assert seen.answered == right / total and seen.repeated is None
    assert set(seen.peaks) == {"answers"}


def test_writing_ends_where_the_model_ends(tiny: Tiny) -> None:
    model, tokenizer, recorder, prompt = load(tiny("llama"))
    reading = Reading(model, tokenizer, recorder, prompt, token_sample(tokenizer, "log", 0, 60).tokens)
    free = reading.written("", 8)
    assert len(free) == 8
    model.generation_config.eos_token_id = [free[3], 1]
    reading = Reading(model, tokenizer, recorder, prompt, reading.context)
    assert reading.written("", 8) == free[: free.index(free[3])]


def test_a_text_can_be_put_to_many_uses(tiny: Tiny) -> None:
    model, tokenizer, recorder, prompt = load(tiny("qwen3"))
    sample = token_sample(tokenizer, "records", 0, 200)
    both = observe(model, tokenizer, recorder, prompt, sample, "both")
    assert set(both.peaks) == {"repeat", "answers", "both"}
    for target in ("answers", "repeat"):
        alone = observe(model, tokenizer, recorder, prompt, sample, target)
        # What came before left nothing behind.
        torch.testing.assert_close(alone.peaks[target], both.peaks[target])
        assert alone.entries(target).watched == both.watched
        for one, other in zip([*alone.keys, *alone.values], [*both.keys, *both.values], strict=True):
            assert one.shape[1] == both.watched.stop
            assert torch.equal(one, other)
    # What is learned of both is the mean of what is learned of either.
    targets = {name: target_of(both.peaks[name]) for name in both.peaks}
    mean = (targets["repeat"] + targets["answers"]) / 2
    torch.testing.assert_close(targets["both"], mean, rtol=0, atol=1e-3)
    for target in ("answers", "repeat"):
        assert not torch.allclose(mean, targets[target], atol=0.1)
    assert both.repeated is not None and both.answered is not None


def test_a_text_without_questions_is_gone_on_with(tiny: Tiny) -> None:
    model, tokenizer, recorder, prompt = load(tiny("llama"))
    sample = TokenSample("log", 0, list(range(2, 40)), (), "")
    seen = observe(model, tokenizer, recorder, prompt, sample, "answers")
    assert seen.answered is None and bool((seen.peaks["answers"] > 0).all())


def test_positions_are_enough_and_not_many_too_many(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, recorder, prompt = load(tiny("llama"))
    sample = token_sample(tokenizer, "table", 0, 700)
    feed, most = Reading._feed, 0

    def counted(self: Reading, tokens: list[int]) -> Tensor:
        nonlocal most
        hidden = feed(self, tokens)
        most = max(most, self._cache.get_seq_length())
        return hidden

    monkeypatch.setattr(Reading, "_feed", counted)
    long = TokenSample("table", 0, sample.tokens, (Ask("Which?", "x" * 900),), "")
    for target, texts in (("repeat", [sample]), ("answers", [sample]), ("both", [sample]), ("both", [sample, long])):
        most = 0
        for text in texts:
            observe(model, tokenizer, recorder, prompt, text, target)
        assert most <= positions(tokenizer, prompt, texts, target) <= most + 60


def test_chat_template_has_to_give_the_message() -> None:
    class Silent:
        chat_template = "there is one"

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
            return "no message"

    with pytest.raises(CalibrationError, match="chat template"):
        prompt_of(Silent())
