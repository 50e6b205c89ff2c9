# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A whole `deltamem eval` over an engine that answers by rule: what is asked, what comes out, that it resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.evaluation.eval import run as run_module
from deltamem_vllm.evaluation.eval.drawing import Drawing
from deltamem_vllm.evaluation.eval.endpoint import is_in
from deltamem_vllm.evaluation.eval.engine import Cell, Request
from deltamem_vllm.evaluation.eval.grid import Grid
from deltamem_vllm.evaluation.eval.plan import all_keys, cell_key
from deltamem_vllm.evaluation.eval.run import Evaluation, WindowCutShort
from deltamem_vllm.evaluation.eval.tables import CONDITIONS
from deltamem_vllm.evaluation.results import Results
from tests.support.toy_grid import grid


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path)


class RuleEngine:
    """Stands for a child process: the full cache is always right, a policy on even keys only."""

    asked: list[str] = []
    cached = 0
    fail_after: int | None = None
    unsolved: str = "none"

    def __init__(self, arguments: dict[str, Any], log: Path, *, stock: bool) -> None:
        self.stock = stock
        self.facts = {
            "layers": 2, "kv_heads": 1, "head_size": 8, "dtype": "bfloat16", "block_size": 32, "block_bytes": 2048,
        }  # fmt: skip

    def stop(self) -> None:
        pass

    def __enter__(self) -> RuleEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, samples: list[list[Request]], concurrency: int) -> Iterator[Cell]:
        for requests in samples:
            for request in requests:
                if RuleEngine.fail_after is not None and len(RuleEngine.asked) >= RuleEngine.fail_after:
                    raise KeyboardInterrupt
                RuleEngine.asked.append(request["key"])
                yield self.answer(request)

    def answer(self, request: Request) -> Cell:
        written = request["forced"] or list(range(request["generate"]))
        positions = request["measured"] or list(range(1, len(written)))
        right = request["is_reference"] or "/tova/" in request["key"]
        right &= self.unsolved not in request["key"]
        return Cell(
            key=request["key"],
            skipped=request["only_if_solved"] and "niah" not in request["key"],
            positions=positions,
            gold=[-0.5] * len(positions),
            argmax=[written[p] if right else -1 for p in positions],
            kl=[0.0 if right else 2.0] * len(positions),
            written=written,
            cached_tokens=min(self.cached, len(request["prompt"])),
            compactions=1,
            seconds=0.1,
            resident_bytes=2048,
            resident_tokens=32,
            logical_tokens=len(request["prompt"]) + 1,
        )


@pytest.fixture
def evaluate(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Results]:
    monkeypatch.setattr(run_module, "Engine", RuleEngine)
    monkeypatch.setattr(RuleEngine, "asked", [])
    monkeypatch.setattr(RuleEngine, "fail_after", None)
    monkeypatch.setattr(RuleEngine, "unsolved", "none")

    def run(which: Grid, workers: int = 1) -> Results:
        results = Results(tmp_path / "eval.jsonl")
        conditions = {"model": "toy", "machine": {}, "code": {}}
        one = Evaluation(which, "toy", tokenizer, conditions, results, tmp_path, lambda line: None)
        one.run(workers, lambda: None)
        return results

    return run


def test_every_cell_is_measured_once_and_nothing_twice(evaluate: Callable[..., Results]) -> None:
    results = evaluate(grid(), workers=2)
    (run,) = results.runs()
    cells = results.cells(run)
    assert sorted(cells.keys() - {CONDITIONS}) == sorted(all_keys(grid()))
    assert sorted(RuleEngine.asked) == sorted(all_keys(grid()))
    row = cells["512/niah-single/0/two-turn/tova/0.1"]
    assert row["answers"][0]["right"] and row["agreement"] == 1.0 and row["kl"] == 0.0
    assert row["full_bytes"] == -(-row["logical_tokens"] // 32) * 2048
    wrong = cells["512/niah-single/0/aware/random/0.5"]
    assert not wrong["answers"][0]["right"] and wrong["agreement"] == 0.0 and wrong["kl"] == 2.0
    assert wrong["gold_logprob"] == -0.5
    RuleEngine.asked.clear()
    evaluate(grid())
    assert RuleEngine.asked == []


def test_an_interrupted_run_goes_on(evaluate: Callable[..., Results], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuleEngine, "fail_after", 20)
    with pytest.raises(KeyboardInterrupt):
        evaluate(grid())
    first = set(RuleEngine.asked)
    monkeypatch.setattr(RuleEngine, "fail_after", None)
    monkeypatch.setattr(RuleEngine, "asked", [])
    results = evaluate(grid())
    (run,) = results.runs()
    assert sorted(results.cells(run).keys() - {CONDITIONS}) == sorted(all_keys(grid()))
    # What others are compared with runs again for a sample that was cut off, and nothing else does.
    again = first & set(RuleEngine.asked)
    assert all("/full/" in key for key in again) and len(again) <= 3


def test_more_samples_and_policies_extend_a_run(evaluate: Callable[..., Results]) -> None:
    evaluate(grid())
    RuleEngine.asked.clear()
    results = evaluate(grid(lengths={512: 3, 1024: 1}, policies=["tova", "snapkv"]))
    assert len(results.runs()) == 1
    assert all("/2/" in key or "/snapkv/" in key or "/full/" in key for key in RuleEngine.asked)


def test_what_the_full_cache_fails_is_left_out_if_wanted(evaluate: Callable[..., Results]) -> None:
    results = evaluate(grid(only_solved=True))
    cells = results.cells(results.runs()[0])
    assert cells["1024/common-words/0/aware/tova/0.1"] == {
        "length": 1024, "task": "common-words", "index": 0, "seed": 0, "kind": "question", "setting": "aware",
        "policy": "tova", "budget": 0.1, "skipped": True,
    }  # fmt: skip
    assert "skipped" not in cells["1024/continuation/0/text/tova/0.1"]
    assert "skipped" not in cells["1024/common-words/0/aware/full/1.0"]


# ---- as many samples as it takes --------------------------------------------------------------------------

WANTED: dict[str, Any] = {
    "tasks": ["niah-single", "common-words", "continuation"],
    "lengths": {512: 8},
    "at_most": {"continuation": 3},
    "solved": 3,
    "settings": ["aware", "two-turn"],
    "fp8": False,
    "engine": {"concurrency": 1},
}
"""niah-single is solved, common-words is not and cannot be asked in two turns."""


def test_samples_are_drawn_until_enough_are_solved(
    evaluate: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RuleEngine, "unsolved", "common-words")
    results = evaluate(grid(**WANTED))
    cells = results.cells(results.runs()[0])
    measured = {key.rsplit("/", 2)[0] for key, cell in cells.items() if key != CONDITIONS and not cell.get("skipped")}
    questions = {f"512/niah-single/{i}/{setting}" for i in range(3) for setting in ("aware", "two-turn")}
    vain = {f"512/common-words/{i}/aware" for i in range(2)}
    assert measured == questions | vain | {f"512/continuation/{i}/text" for i in range(3)}
    assert not any("common-words" in key and "/full/" not in key for key in cells if not cells[key].get("skipped"))
    assert all(f"{sample}/random/0.1" in cells for sample in questions)
    RuleEngine.asked.clear()
    evaluate(grid(**WANTED))
    assert RuleEngine.asked == []
    evaluate(grid(**WANTED | {"solved": {512: 4}}))
    assert {key.split("/")[2] for key in RuleEngine.asked if "niah" in key} == {"3"}


@pytest.mark.parametrize("stop", [1, 7, 30, 60])
def test_a_drawn_run_goes_on_with_the_same_samples(
    evaluate: Callable[..., Results], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: int
) -> None:
    monkeypatch.setattr(RuleEngine, "unsolved", "common-words")
    whole = evaluate(grid(**WANTED))
    expected = set(whole.cells(whole.runs()[0]))
    (tmp_path / "eval.jsonl").unlink()
    RuleEngine.asked.clear()
    monkeypatch.setattr(RuleEngine, "fail_after", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(grid(**WANTED))
    monkeypatch.setattr(RuleEngine, "fail_after", None)
    results = evaluate(grid(**WANTED))
    assert set(results.cells(results.runs()[0])) == expected


def test_too_few_samples_are_said_and_end(evaluate: Callable[..., Results], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuleEngine, "unsolved", "common-words")
    which = grid(**WANTED | {"solved": 20})
    results = evaluate(which)
    run = results.runs()[0]
    drawing = Drawing(which, lambda key: results.get(run, key), 4, 1)
    assert drawing.short() == ["aware 512: 8 of 20", "two-turn 512: 8 of 20"]
    assert (drawing.left(), drawing.next()) == (0, [])


def test_workers_are_handed_no_sample_twice_and_few_in_vain() -> None:
    rows: dict[str, dict[str, Any]] = {}
    which = grid(tasks=["niah-single"], lengths={512: 40}, solved=10, settings=["aware"], fp8=False)
    drawing = Drawing(which, rows.get, most=6, least=2)
    first, second = drawing.next(), drawing.next()
    assert [len(first), len(second)] == [6, 4]
    # All ten may turn out solved; a third worker gets the least.
    assert len(drawing.next()) == 2
    assert len({one.sample for one in first + second}) == 10
    for one in first:
        for policy, budget in which.points():
            key = cell_key(*one.sample, "aware", policy, budget)
            rows[key] = {"answers": [{"right": one.index < 4}]}
    drawing.finished(first)
    # Four of six were solved, six are at work.
    assert len(drawing.next()) == 2
    assert drawing.left() == 6 * len(which.points())


def test_a_policy_judged_with_too_few_queries_is_an_error(
    evaluate: Callable[..., Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RuleEngine, "cached", 100_000)
    with pytest.raises(WindowCutShort, match="only 0 tokens of its prompt were computed, the policy looks at 8"):
        evaluate(grid())


# ---- endpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reply", "found"),
    [
        ("1234567", "It is 1234567.", True),
        ("1234567", "It is 12345678.", False),
        ("1234567", "x1234567", False),
        ("Orlow", "in orlow, I think", True),
        ("orlow", "Orlowski", False),
        ("a.b", "a.b", True),
        ("a.b", "axb", False),
    ],
)
def test_a_value_counts_as_a_word_of_its_own(value: str, reply: str, found: bool) -> None:
    assert is_in(value, reply) is found
