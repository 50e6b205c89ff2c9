# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The needle tasks: what is hidden, where, how long the prompt is, and what counts as an answer."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from deltamem_vllm.evaluation.needle import TASKS, Question, make_question, message_counter

Count = Callable[[str], int]
# A vocabulary of words, one of words and marks, one of pieces of four characters, one of bytes.
COUNTERS: dict[str, Count] = {
    "words": lambda text: len(text.split()),
    "words and marks": lambda text: len(re.findall(r"\w+|[^\w\s]", text)),
    "pieces": lambda text: len(re.findall(r"\w{1,4}|\W", text)),
    "bytes": lambda text: len(text.encode()),
}


def question(task: str = "needle", index: int = 0, **changes: Any) -> Question:
    options: dict[str, Any] = {"seed": 0, "length": 900, "count_tokens": COUNTERS["words and marks"]}
    return make_question(task, index, **options | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("index", range(6))
def test_the_answer_and_its_sentence_are_there_once(task: str, index: int) -> None:
    asked = question(task, index)
    assert re.fullmatch(r"[1-9]\d{6}", asked.answer)
    assert asked.prompt.count(asked.answer) == 1
    assert asked.prompt.count(f"The special magic number for {asked.key} is {asked.answer}.") == 1
    assert asked.prompt.endswith(f"What is the special magic number for {asked.key} mentioned in the text?")
    assert asked.opening == f"The special magic number for {asked.key} mentioned in the text is"


def test_the_haystack_has_no_other_digits() -> None:
    asked = question(length=5000)
    assert re.findall(r"\d+", asked.prompt) == [asked.answer]


def test_multikey_hides_as_many_different_numbers_as_asked() -> None:
    asked = question("multikey", keys=5)
    facts = re.findall(r"The special magic number for (\w+) is (\d{7})\.", asked.prompt)
    assert len({name for name, _ in facts}) == len({value for _, value in facts}) == len(facts) == 5
    assert (asked.key, asked.answer) in facts


@pytest.mark.parametrize("name", COUNTERS)
@pytest.mark.parametrize("task", TASKS)
def test_length_is_met_from_below_by_any_tokenizer(task: str, name: str) -> None:
    count = COUNTERS[name]
    longest_word = count(" remembered,")
    for length in (600, 1234, 3680):
        asked = question(task, length=length, count_tokens=count)
        assert asked.tokens == count(asked.prompt)
        assert length - longest_word <= asked.tokens <= length


@pytest.mark.parametrize("task", TASKS)
def test_length_is_met_in_the_embedded_models_chat_template(task: str, smollm2_path: str) -> None:
    from transformers import AutoTokenizer

    asked = question(task, length=3680, count_tokens=message_counter(smollm2_path))
    assert 3676 <= asked.tokens <= 3680
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    # Several tokens, so that most of the answer is read from the compacted cache.
    assert len(tokenizer(asked.answer).input_ids) == 7


def test_a_seed_means_the_same_question_in_another_process() -> None:
    code = (
        "from deltamem_vllm.evaluation.needle import make_question;"
        "print(make_question('multikey', 3, seed=7, length=500, count_tokens=lambda t: len(t.split())).prompt)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == question("multikey", 3, seed=7, length=500, count_tokens=COUNTERS["words"]).prompt + "\n"


def test_seed_index_and_task_all_change_the_question() -> None:
    prompts = {question(t, i, seed=s).prompt for t in TASKS for i in range(3) for s in range(2)}
    assert len(prompts) == 12


@pytest.mark.parametrize("asked", [5, 8, 13])
def test_depths_are_spread_evenly_however_many_are_asked(asked: int) -> None:
    depths = sorted(question(index=index).depth for index in range(asked))
    gaps = [after - before for before, after in pairwise([0.05, *depths, 0.95])]
    assert max(gaps) <= 0.9 * 2 / asked
    assert depths[0] >= 0.05 and depths[-1] <= 0.95


@pytest.mark.parametrize("index", range(5))
def test_depth_says_where_the_needle_is(index: int) -> None:
    asked = question(index=index, length=4000)
    assert asked.prompt.index(asked.answer) / len(asked.prompt) == pytest.approx(asked.depth, abs=0.03)


def test_only_the_whole_number_is_an_answer() -> None:
    asked = question()
    number = asked.answer
    assert asked.is_answered_by(f"The number is {number}.")
    assert asked.is_answered_by(f"{number}1 or {number}")
    for wrong in ("", number[:-1], f"{number}0", f"1{number}", f"{number[0]},{number[1:]}"):
        assert not asked.is_answered_by(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "haystack"}, "unknown task 'haystack'; available: needle, multikey"),
        ({"index": -1}, "index must be >= 0, got -1"),
        ({"keys": 1}, "keys must be 2 to 20, got 1"),
        ({"length": 10}, "length 10 leaves no room .* allow at least"),
    ],
)
def test_bad_arguments_are_explained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        question(**changes)
