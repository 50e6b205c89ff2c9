# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The tokens that `deltamem eval` makes of a sample in each setting."""

from __future__ import annotations

from typing import Any

import pytest

from deltamem_vllm.evaluation.eval.encode import Encoder, EncodingError, aligned_sample, computed_after_hit
from deltamem_vllm.evaluation.tasks import TASKS, make_sample


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


@pytest.mark.parametrize("task", [name for name, info in TASKS.items() if info.kind == "question"])
def test_settings_are_the_same_tokens_cut_at_different_places(encoder: Encoder, tokenizer: Any, task: str) -> None:
    sample = make_sample(task, 0, seed=3, length=1024, count_tokens=encoder.count)
    aware, agnostic = encoder.encode(sample, "aware"), encoder.encode(sample, "agnostic")
    assert aware.forced is not None and agnostic.forced is not None
    assert aware.prompt + aware.forced == agnostic.prompt + agnostic.forced
    assert len(aware.prompt) == sample.tokens
    assert tokenizer.decode(agnostic.prompt).endswith(sample.context)
    assert sample.question.text in tokenizer.decode(agnostic.forced)
    for encoded, asked in [(aware, sample.question), (agnostic, sample.question)]:
        read = [tokenizer.decode(encoded.forced[a:b]).strip() for a, b in encoded.answers]
        assert tuple(read) == asked.answers
        assert encoded.measured == tuple(p for a, b in encoded.answers for p in range(a, b))
        assert encoded.measured[0] > 0
    if sample.follow_up is None:
        with pytest.raises(EncodingError, match="no second question"):
            encoder.encode(sample, "two-turn")
        return
    two = encoder.encode(sample, "two-turn")
    assert two.forced is not None and two.prompt == aware.prompt
    assert [tokenizer.decode(two.forced[a:b]).strip() for a, b in two.answers] == list(sample.follow_up.answers)
    text = tokenizer.decode(two.forced)
    assert text.index(sample.question.answer) < text.index(sample.follow_up.text)


def test_a_model_without_chat_template_gets_plain_text(tokenizer: Any) -> None:
    plain = Encoder(tokenizer, chat=False)
    sample = make_sample("niah-text", 0, seed=3, length=600, count_tokens=plain.count)
    encoded = plain.encode(sample, "agnostic")
    assert "<|im_start|>" not in tokenizer.decode(encoded.prompt)
    assert encoded.forced is not None and sample.question.text in tokenizer.decode(encoded.forced)


def test_texts_are_continued(encoder: Encoder, tokenizer: Any) -> None:
    sample = make_sample("continuation", 0, seed=3, length=600, count_tokens=encoder.count)
    encoded = encoder.encode(sample, "text", most_forced=10)
    assert encoded.forced is not None and len(encoded.forced) == 10
    assert encoded.measured == tuple(range(1, 10))
    assert sample.question.answer.startswith(tokenizer.decode(encoded.forced).strip()[:20])
    written = encoder.encode(
        make_sample("generation", 0, seed=3, length=600, count_tokens=encoder.count), "text", most_forced=10
    )
    assert written.forced is None and written.measured == ()


def test_prompts_leave_a_whole_window_after_a_prefix_hit(encoder: Encoder) -> None:
    assert [computed_after_hit(tokens, 32) for tokens in (32, 33, 64, 70)] == [32, 1, 32, 6]
    for index in range(6):
        _, requests = aligned_sample(
            lambda n, i=index: make_sample("niah-single", i, seed=1, length=n, count_tokens=encoder.count),
            lambda sample: [encoder.encode(sample, setting) for setting in ("aware", "agnostic")],
            length=700,
            block_size=32,
            window=16,
        )
        assert all(computed_after_hit(len(r.prompt), 32) >= 16 for r in requests)
        assert 700 - 128 <= len(requests[0].prompt) <= 700
