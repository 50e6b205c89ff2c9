# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Needle and multi-key needle: can the model still read one number out of a long prompt?

After RULER's definitions of the single and the multi-key "needle in a haystack" (arXiv 2404.06654, section
3.1): a sentence that gives a key its value is hidden in a long text, and the question at the end names the
key. In the multi-key task several such sentences with different keys are hidden and one of them is asked;
the others are there to be confused with. Haystack, wording and keys are our own (see `prose`).

How to read a score under eviction: the question is part of the prompt, so the observation window has seen
it when the cache is compacted (query-aware). The prompt's last forward pass, which also yields the first
token of the answer, still reads the full cache; every later token reads the compacted one. Values are
therefore numbers of seven digits, seven tokens in most vocabularies, and only the whole number counts.

RULER ends its prompts with the first words of the answer, so that the next token has to be the value. A
question has them as `opening`, for the assistant's turn. Without them a chat model writes such words itself,
and the cache is compacted before the model has looked for the value.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

from deltamem_vllm.evaluation.prose import sentences

Task = Literal["needle", "multikey"]
TASKS: tuple[Task, ...] = get_args(Task)

_KEYS = (
    "Lisbon", "Cairo", "Oslo", "Lima", "Vienna", "Toronto", "Nairobi", "Athens", "Madrid", "Seoul", "Warsaw",
    "Havana", "Dublin", "Bangkok", "Prague", "Chicago", "Geneva", "Berlin", "Mumbai", "Sydney",
)  # fmt: skip
_NEEDLE = "The special magic number for {key} is {value}."
_INTRODUCTION = "Read the following text carefully and remember the special magic numbers in it.\n\n"
_QUESTION = "\n\nWhat is the special magic number for {key} mentioned in the text?"
_OPENING = "The special magic number for {key} mentioned in the text is"
_GOLDEN = (math.sqrt(5) - 1) / 2
# Share of the sentences that never holds a needle, at either end: the protected sinks and the recent tokens
# would keep it whatever the scorer says.
_MARGIN = 0.05


@dataclass(frozen=True)
class Question:
    """One prompt and what its answer must contain.

    Parameters
    ----------
    task
        Which task it belongs to.
    index
        Its number within the task; with `seed` it determines everything else.
    seed
        The seed it was made from.
    prompt
        The user's message: introduction, text, question.
    key
        What is asked for.
    answer
        Seven digits, once in `prompt`.
    opening
        First words of an answer, up to the number.
    depth
        Where the needle lies: 0 is the start of the text, 1 its end.
    tokens
        Length of `prompt` by the counting function it was made with.
    """

    task: Task
    index: int
    seed: int
    prompt: str
    key: str
    answer: str
    opening: str
    depth: float
    tokens: int

    def is_answered_by(self, reply: str) -> bool:
        """Whether `reply` contains the number exactly: not as part of a longer one, commas not forgiven."""
        start = reply.find(self.answer)
        while start >= 0:
            around = reply[max(start - 1, 0) : start] + reply[start + len(self.answer) :][:1]
            if not any(character.isdigit() for character in around):
                return True
            start = reply.find(self.answer, start + 1)
        return False


def message_counter(model: str) -> Callable[[str], int]:
    """Return a function that counts the tokens of a user's message in the model's chat template.

    Parameters
    ----------
    model
        Local path or Hugging Face id.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    return count


def make_question(
    task: Task,
    index: int,
    *,
    seed: int,
    length: int,
    count_tokens: Callable[[str], int],
    keys: int = 3,
) -> Question:
    """Make question number `index` of a task.

    Parameters
    ----------
    task
        `needle` hides one number, `multikey` hides `keys` of them.
    index
        >= 0. Depths of the numbers 0, 1, 2, ... are spread evenly however many are asked.
    seed
        Another seed gives other texts, keys and numbers.
    length
        Tokens of the prompt by `count_tokens`. Met from below, to within one word.
    count_tokens
        Length of a message in tokens; include the chat template here to set the length of what is sent.
    keys
        Needles in the multi-key task, 2 to 20.

    Raises
    ------
    ValueError
        The arguments are out of range, or `length` leaves no room for a text.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; available: {', '.join(TASKS)}")
    if index < 0:
        raise ValueError(f"index must be >= 0, got {index}")
    if not 2 <= keys <= len(_KEYS):
        raise ValueError(f"keys must be 2 to {len(_KEYS)}, got {keys}")
    # A string seeds the same way in every process and Python version; a tuple's hash does not.
    rng = random.Random(f"{task}/{seed}/{index}")
    hidden = 1 if task == "needle" else keys
    names = rng.sample(_KEYS, hidden)
    values = [str(value) for value in rng.sample(range(1_000_000, 10_000_000), hidden)]
    # Multiples of the golden ratio fill the unit interval evenly whatever their number.
    turn = (0.5 + index * _GOLDEN) % 1
    depths = [_MARGIN + (1 - 2 * _MARGIN) * ((turn + other / hidden) % 1) for other in range(hidden)]
    needles = [_NEEDLE.format(key=k, value=v) for k, v in zip(names, values, strict=True)]
    question = _QUESTION.format(key=names[0])

    def render(text: list[str]) -> str:
        placed = list(text)
        # From the back, so that an inserted needle does not move the places of the others.
        for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
            placed.insert(round(depth * len(text)), needle)
        return f"{_INTRODUCTION}{' '.join(placed)}{question}"

    prompt = _fill(render, sentences(rng).__next__, length, count_tokens)
    return Question(
        task=task,
        index=index,
        seed=seed,
        prompt=prompt,
        key=names[0],
        answer=values[0],
        opening=_OPENING.format(key=names[0]),
        depth=depths[0],
        tokens=count_tokens(prompt),
    )


def _fill(
    render: Callable[[list[str]], str],
    next_sentence: Callable[[], str],
    length: int,
    count_tokens: Callable[[str], int],
) -> str:
    """Render as much text as fits `length`: whole sentences, then the first words of one more."""
    empty = count_tokens(render([]))
    if empty >= length:
        raise ValueError(
            f"length {length} leaves no room for a text: introduction, needles and question take {empty} "
            f"tokens; allow at least {empty + 100}"
        )
    text: list[str] = []
    while count_tokens(render(text)) <= length:
        # Twice as much each time: a tokenizer call costs more than a sentence.
        text += islice(iter(next_sentence, None), max(len(text), 8))
    whole = _largest(len(text), lambda n: count_tokens(render(text[:n])) <= length)
    words = text[whole].rstrip(".").split(" ")

    def with_words(n: int) -> str:
        part = [f"{' '.join(words[:n]).rstrip(',')}."] if n else []
        return render(text[:whole] + part)

    return with_words(_largest(len(words), lambda n: count_tokens(with_words(n)) <= length))


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n <= limit that fits, given that 0 does and that what fits is a prefix."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
