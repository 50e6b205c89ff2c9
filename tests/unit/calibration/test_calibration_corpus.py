# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The texts that a calibration learns from: always the same, answerable, and nothing of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest

from deltamem_vllm.calibration.corpus import (
    FAMILIES,
    KINDS,
    Sample,
    corpus_sample,
    draw,
    draw_held_out,
    held_out_plan,
    plan,
    token_sample,
)
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.evaluation import texts
from deltamem_vllm.evaluation.tasks import TASKS, facts, make_sample, needles
from tests.support.calibration_models import byte_tokenizer

GENERATED = tuple(kind for kind in KINDS if kind not in ("novel", "mixed"))
SEEDS = range(4)
CHARACTERS = 20_000


@cache
def sample(kind: str, seed: int, held_out: bool = False) -> Sample:
    return corpus_sample(kind, seed, CHARACTERS, held_out=held_out)


def whole(kind: str) -> str:
    """Some text of a kind and all its questions."""
    made = [sample(kind, seed, held_out) for seed in SEEDS for held_out in (False, True)]
    return "\n".join(part for one in made for part in (one.text, *(word for ask in one.questions for word in ask)))


def eight_grams(text: str) -> set[tuple[str, ...]]:
    """Runs of eight words, without marks and case; all numbers are the same."""
    words = re.findall(r"[a-z#]+", re.sub(r"\d+", "#", text.lower()))
    return set(zip(*(words[i:] for i in range(8)), strict=False))


@cache
def of_evaluation() -> frozenset[tuple[str, ...]]:
    """Runs of eight words of all tasks."""
    return frozenset(gram for said in said_by_tasks() for gram in eight_grams(said))


def said_by_tasks() -> Iterator[str]:
    """What tasks say themselves: questions, openings, and contexts that do not come from the evaluation's book."""
    for task in TASKS:
        for index in range(5):
            made = make_sample(task, index, seed=index, length=1200, count_tokens=lambda text: len(text.split()))
            for question in filter(None, (made.question, made.follow_up)):
                yield f"{question.text} {question.opening} {question.answer if made.kind == 'question' else ''}"
            if task in ("niah-single", "variable-tracking", "key-value", "repeated", "common-words", "frequent-words"):
                yield made.context
            else:
                yield made.context[:200] if made.kind == "question" else ""
    for kind in facts.KINDS:
        for value in kind.values:
            yield " ".join((kind.statement, kind.question, kind.opening)).format(who="Somebody", value=value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_text(kind: str) -> None:
    first = sample(kind, 3)
    assert first == corpus_sample(kind, 3, CHARACTERS)
    assert first.text.isascii() and len(first.text) >= CHARACTERS
    assert len({sample(kind, seed, held_out).text for seed in SEEDS for held_out in (False, True)}) == 2 * len(SEEDS)
    # A longer one goes on where a shorter one ends.
    assert first.text.startswith(corpus_sample(kind, 3, 1000).text)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_different_and_have_their_answer_in_the_text(kind: str) -> None:
    for seed in SEEDS:
        made = sample(kind, seed)
        assert 3 <= len(made.questions) == len(made.ends) <= 8
        assert list(made.ends) == sorted(made.ends) and made.ends[-1] <= len(made.text)
        assert len({question for question, _ in made.questions}) == len(made.questions)
        for (question, answer), end in zip(made.questions, made.ends, strict=True):
            assert answer and answer not in question
            # Where the answer stands, near the end of what it takes.
            assert answer in re.sub(r"\s+", " ", made.text[max(end - 700, 0) : end])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_an_evaluation_is_in_it(kind: str) -> None:
    text = whole(kind)
    found = eight_grams(text)
    assert len(found) > 500
    assert not found & of_evaluation()
    assert not re.search(r"magic number|\bVAR\b|code of the|most (?:frequent|common) (?:code )?words|the key \"", text)


@pytest.mark.parametrize("kind", GENERATED)
def test_names_and_values_of_an_evaluation_are_not_in_it(kind: str) -> None:
    words = set(re.findall(r"[A-Za-z]+", whole(kind)))
    theirs = {value for kind in facts.KINDS for value in kind.values}
    theirs |= {*facts.FIRST_NAMES, *facts.SURNAMES, *needles.CITIES}
    assert not words & theirs
    # Seven and five digits, and six hexadecimal ones, are what tasks ask for.
    assert not re.search(r"(?<![\w.,/-])(?:\d{7}|\d{5})(?![\w.,/-])", whole(kind))
    assert not re.search(r'"[0-9a-f]{6}": "[0-9a-f]{6}"', whole(kind))


def test_the_check_finds_an_evaluation() -> None:
    # Or the tests above would prove nothing.
    found = eight_grams("And then: read the following text carefully and remember the special magic number")
    assert found & of_evaluation()
    said = eight_grams("The guard walked on with the lamp. Nothing stirred, and the guard walked on.")
    assert said & of_evaluation()


def test_prose_is_of_the_calibrations_book_and_held_out_prose_of_its_last_part() -> None:
    book = "".join(texts.sentences("calibration"))
    seen: list[tuple[bool, int]] = []
    for seed in range(20):
        for held_out in (False, True):
            text = corpus_sample("novel", seed, 4000, held_out=held_out).text
            assert text[:500] in book
            seen.append((held_out, book.index(text[:500])))
    learned = [place for held_out, place in seen if not held_out]
    assert max(learned) < min(place for held_out, place in seen if held_out)
    # Samples of neighbouring seeds do not overlap.
    assert all(abs(a - b) > 4000 for a, b in zip(learned, learned[1:], strict=False))
    # What is read after the end of a part is the beginning of that part.
    border = min(place for held_out, place in seen if held_out)
    for held_out in (False, True):
        long = corpus_sample("novel", 1, len(book), held_out=held_out).text
        assert (book[border - 30_000 : border - 29_500] in long) != held_out
        assert (book[-2000:-1500] in long) == held_out


def test_samples_have_exactly_the_tokens_and_only_questions_that_they_answer() -> None:
    tokenizer = byte_tokenizer()
    for kind in KINDS:
        cut = token_sample(tokenizer, kind, 1, 1500)
        text = tokenizer.decode(cut.tokens)
        assert len(cut.tokens) == 1500 and corpus_sample(kind, 1, 3000).text.startswith(text)
        assert len(cut.questions) <= 8 and all(answer in text for _, answer in cut.questions)
        assert cut == token_sample(tokenizer, kind, 1, 1500)
        assert cut.sha256 != token_sample(tokenizer, kind, 1, 1499).sha256
    # The question about what the cut took away is gone.
    full = corpus_sample("glossary", 1, 100)
    last = full.ends[0]
    assert len(token_sample(tokenizer, "glossary", 1, last).questions) == 1
    assert not token_sample(tokenizer, "glossary", 1, last - 1).questions


def test_a_corpus_has_all_kinds_and_holds_out_one_of_each_family() -> None:
    assert sorted(kind for members in FAMILIES.values() for kind in members) == sorted(KINDS)
    drawn = plan(16)
    assert {kind for kind, _ in drawn} == set(KINDS) and [kind for kind, _ in drawn].count("novel") == 4
    assert len(set(plan(100, KINDS, 0)) | set(plan(100, KINDS, 1))) == 200
    assert [kind for kind, _ in plan(5, ("log", "code"))] == ["log", "code", "log", "code", "log"]
    assert [kind for kind, _ in plan(6, ("code", "novel"))] == ["novel", "code", "code", "code", "novel", "code"]
    assert [kind for kind, _ in plan(2, ("novel",))] == ["novel", "novel"]
    held_out = held_out_plan()
    for (kind, _), members in zip(held_out, FAMILIES.values(), strict=True):
        assert kind in members
    assert [kind for kind, _ in held_out_plan(("log", "novel"))] == ["novel", "log"]
    tokenizer = byte_tokenizer()
    mine = [made.sha256 for made in draw(tokenizer, 5, 200)]
    assert len(set(mine) | {made.sha256 for made in draw_held_out(tokenizer, 200)}) == 11
    assert mine == [made.sha256 for made in draw(tokenizer, 5, 200)]


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(CalibrationError, match="unknown kinds of text poem; there are novel, table"):
        plan(3, ("poem", "log"))
    with pytest.raises(CalibrationError, match=r"\(none given\)"):
        held_out_plan(())
