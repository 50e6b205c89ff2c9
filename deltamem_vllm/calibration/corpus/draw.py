# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Samples of the corpus: of any kind, from a seed, and cut to tokens.

The text is natural (a novel) and generated (general structure: records, lines, code, talk, reference, mixtures).
Nothing in it is of the evaluation: no task, no wording, no filler, none of its book.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deltamem_vllm.calibration.corpus import code, lines, prose, reference, tabular, talk
from deltamem_vllm.calibration.corpus.parts import Parts
from deltamem_vllm.calibration.corpus.unit import Ask, Sample, Unit
from deltamem_vllm.calibration.errors import CalibrationError

NOVEL = "novel"
QUESTIONS = 8
"""Most questions of a sample."""

_GOLDEN = (math.sqrt(5) - 1) / 2
_GENERATED: dict[str, Callable[[Parts], Iterator[Unit]]] = {
    "table": tabular.tables,
    "dialogue": talk.dialogue,
    "log": lines.log,
    "code": code.code,
    "glossary": reference.glossary,
    "records": tabular.records,
    "config": lines.config,
    "instructions": reference.instructions,
    "filler": lines.filler,
    "products": tabular.products,
    "list": reference.numbered,
}
_PROSE: dict[str, Callable[[Parts, float, bool], Iterator[Unit]]] = {NOVEL: prose.novel, "mixed": prose.mixed}
# In an order in which any first few are different.
KINDS: tuple[str, ...] = (NOVEL, "table", "dialogue", "mixed", *list(_GENERATED)[2:])
"""All kinds of samples."""
FAMILIES: dict[str, tuple[str, ...]] = {
    "prose": (NOVEL,),
    "mixed": ("mixed",),
    "records": ("table", "records", "products", "list"),
    "lines": ("log", "config", "filler"),
    "code": ("code",),
    "speech": ("dialogue", "glossary", "instructions"),
}
"""Kinds that look alike: of each family something is held out."""

# Natural text among kinds that include it: every so many samples one.
_NOVEL_EVERY = 4
# First try. Text of numbers has fewer characters in a token.
_CHARACTERS_PER_TOKEN = 4
_MOST_CHARACTERS_PER_TOKEN = 256


@dataclass(frozen=True)
class TokenSample:
    """A sample cut to a number of tokens.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    seed : int
        With kind and tokenizer it determines everything.
    tokens : list of int
        Token ids, without any special tokens.
    questions : tuple of Ask
        Pairs (question, answer) that the tokens answer; at most `QUESTIONS`.
    sha256 : str
        Of the text of the tokens and of the questions.
    """

    kind: str
    seed: int
    tokens: list[int]
    questions: tuple[Ask, ...]
    sha256: str


def corpus_sample(kind: str, seed: int, target_characters: int, *, held_out: bool = False) -> Sample:
    """Make a text with questions; the same arguments always give the same one.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    seed : int
        Another seed gives another text.
    target_characters : int
        The text ends with the first line or sentence that reaches them.
    held_out : bool
        Text that no sample without it has anything of: other numbers and names, another part of the book.

    Raises
    ------
    CalibrationError
        There is no such kind.
    """
    return _all_of(kind, seed, target_characters, held_out).spread(QUESTIONS)


def token_sample(tokenizer: Any, kind: str, seed: int, tokens: int, *, held_out: bool = False) -> TokenSample:
    """Make a sample of exactly `tokens` tokens of a tokenizer of transformers; see `corpus_sample`.

    Questions whose answer was cut away are dropped, and those that are left are thinned out evenly.
    """
    characters = _CHARACTERS_PER_TOKEN * tokens
    while True:
        whole = _all_of(kind, seed, characters, held_out)
        ids = list(tokenizer(whole.text, add_special_tokens=False, verbose=False).input_ids)
        if len(ids) >= tokens:
            break
        if characters > _MOST_CHARACTERS_PER_TOKEN * tokens:
            raise CalibrationError(
                f"the tokenizer makes {len(ids)} tokens of {len(whole.text)} characters of English, fewer than one of "
                f"{_MOST_CHARACTERS_PER_TOKEN}; calibrate cannot work with it"
            )
        characters *= 2
    ids = ids[:tokens]
    text = tokenizer.decode(ids)
    kept = [i for i, end in enumerate(whole.ends) if end <= len(text) and whole.questions[i].answer in text]
    cut = Sample(text, tuple(whole.questions[i] for i in kept), tuple(whole.ends[i] for i in kept)).spread(QUESTIONS)
    digest = hashlib.sha256("\n".join([text, *(part for ask in cut.questions for part in ask)]).encode()).hexdigest()
    return TokenSample(kind, seed, ids, cut.questions, digest)


def plan(samples: int, kinds: Sequence[str] = KINDS, seed: int = 0) -> list[tuple[str, int]]:
    """Kind and seed of samples to learn from: the kinds in turn, the novel every fourth if it is among them."""
    _check(kinds)
    others = [kind for kind in kinds if kind != NOVEL]
    found = []
    for i in range(samples):
        natural = NOVEL in kinds and (not others or i % _NOVEL_EVERY == 0)
        rank = i - i // _NOVEL_EVERY - 1 if NOVEL in kinds else i
        found.append((NOVEL if natural else others[rank % len(others)], _seed(seed, i)))
    return found


def held_out_plan(kinds: Sequence[str] = KINDS, seed: int = 0) -> list[tuple[str, int]]:
    """Kind and seed of samples to measure with: one of each family that the kinds belong to."""
    _check(kinds)
    rng = random.Random(f"held-out/{seed}")
    of_families = [[kind for kind in members if kind in kinds] for members in FAMILIES.values()]
    return [(rng.choice(members), _seed(seed, i)) for i, members in enumerate(filter(None, of_families))]


def draw(tokenizer: Any, samples: int, tokens: int, kinds: Sequence[str] = KINDS, seed: int = 0) -> list[TokenSample]:
    """The samples of `plan`, each cut to `tokens` tokens."""
    return [token_sample(tokenizer, kind, own, tokens) for kind, own in plan(samples, kinds, seed)]


def draw_held_out(tokenizer: Any, tokens: int, kinds: Sequence[str] = KINDS, seed: int = 0) -> list[TokenSample]:
    """The samples of `held_out_plan`, each cut to `tokens` tokens."""
    return [token_sample(tokenizer, kind, own, tokens, held_out=True) for kind, own in held_out_plan(kinds, seed)]


def _seed(seed: int, index: int) -> int:
    return 10_000 * seed + index


def _check(kinds: Sequence[str]) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise CalibrationError(
            f"unknown kinds of text {', '.join(unknown) or '(none given)'}; there are {', '.join(KINDS)}"
        )


def _all_of(kind: str, seed: int, target_characters: int, held_out: bool) -> Sample:
    """A sample with all questions that its units have."""
    _check([kind])
    # A string seeds the same way in every process; a tuple's hash does not.
    parts = Parts(random.Random(f"corpus/{kind}/{seed}/{held_out}"))
    # Texts of successive seeds lie far apart in the book, and none begins with its first line, which models know.
    place = (0.5 + seed * _GOLDEN) % 1
    units = _PROSE[kind](parts, place, held_out) if kind in _PROSE else _GENERATED[kind](parts)
    pieces: list[str] = []
    questions: list[Ask] = []
    ends: list[int] = []
    length = 0
    for unit in units:
        pieces.append(unit.text)
        length += len(unit.text)
        questions += unit.asks
        ends += [length - len(unit.text) + len(unit.text.rstrip())] * len(unit.asks)
        if length >= target_characters:
            break
    return Sample("".join(pieces), tuple(questions), tuple(ends))
