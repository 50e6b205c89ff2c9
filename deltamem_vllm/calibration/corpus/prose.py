# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A novel, and a novel with something else in it. The evaluation's novel is another one."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate

from deltamem_vllm.calibration.corpus.lines import event
from deltamem_vllm.calibration.corpus.parts import Parts
from deltamem_vllm.calibration.corpus.tabular import sentence
from deltamem_vllm.calibration.corpus.talk import remark
from deltamem_vllm.calibration.corpus.unit import Ask, Unit
from deltamem_vllm.evaluation.texts import sentences

HELD_OUT = 0.12
"""The last part of the book, which no text to learn from has anything of."""

# A sentence is asked for by its first words, if so many words follow as an answer.
_GIVEN, _ASKED, _MOST = 7, 5, 16
_INSERTED: tuple[Callable[[Parts], Unit], ...] = (event, sentence, remark)


@lru_cache(maxsize=2)
def book(held_out: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Sentences of a part of the calibration's book, and how many characters stand before each."""
    whole = sentences("calibration")
    border = round((1 - HELD_OUT) * len(whole))
    part = whole[border:] if held_out else whole[:border]
    return part, tuple(accumulate(map(len, part[:-1]), initial=0))


def novel(parts: Parts, place: float, held_out: bool) -> Iterator[Unit]:
    """The book from the sentence at `place` on, 0 its beginning and 1 its end; after the end it begins again.

    What can be asked is how a sentence goes on.
    """
    text, before = book(held_out)
    at = bisect_left(before, place * (before[-1] + len(text[-1])))
    while True:
        found = text[at % len(text)]
        yield Unit(found, _how_it_goes_on(found))
        at += 1


def mixed(parts: Parts, place: float, held_out: bool) -> Iterator[Unit]:
    """The book with events, records and agreements between its sentences, at random places."""
    often = parts.rng.uniform(0.03, 0.25)
    for unit in novel(parts, place, held_out):
        yield unit
        if parts.rng.random() < often:
            inserted = parts.one(_INSERTED)(parts)
            # After a paragraph's end, a paragraph of its own.
            text = f"{inserted.text.rstrip()}\n\n" if unit.text.endswith("\n") else inserted.text
            yield Unit(text, inserted.asks)


def _how_it_goes_on(sentence: str) -> tuple[Ask, ...]:
    words = re.findall(r"\S+", sentence)
    if len(words) < _GIVEN + _ASKED:
        return ()
    given = " ".join(words[:_GIVEN])
    return (Ask(f'How does the sentence go on that begins with "{given}"?', " ".join(words[_GIVEN:][:_MOST])),)
