# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What `deltamem eval` asks of its engines, what it makes of their answers, and that it resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.evaluation.eval import run as run_module
from deltamem_vllm.evaluation.eval.drawing import Drawing
from deltamem_vllm.evaluation.eval.encode import Encoder, EncodingError, aligned_sample, computed_after_hit
from deltamem_vllm.evaluation.eval.endpoint import is_in
from deltamem_vllm.evaluation.eval.engine import Cell, Request
from deltamem_vllm.evaluation.eval.grid import Grid, GridError, find_grid, grid_files, load_grid, narrowed, parse_grid
from deltamem_vllm.evaluation.eval.plan import all_keys, cell_key, engine_args, engine_specs
from deltamem_vllm.evaluation.eval.run import Evaluation, WindowCutShort
from deltamem_vllm.evaluation.eval.tables import CONDITIONS
from deltamem_vllm.evaluation.results import Results
from deltamem_vllm.evaluation.tasks import TASKS, make_sample

DOCUMENT: dict[str, Any] = {
    "name": "toy",
    "tasks": ["niah-single", "common-words", "continuation"],
    "lengths": {512: 2, 1024: 1},
    "settings": ["aware", "agnostic", "two-turn"],
    "policies": ["tova"],
    "budgets": [0.5, 0.1],
    "continuation_tokens": 16,
}


def grid(**changes: Any) -> Grid:
    return parse_grid({**DOCUMENT, **changes}, "toy.yaml")


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer)


# ---- grids ------------------------------------------------------------------------------------------------


def test_controls_are_in_every_grid() -> None:
    assert grid().points() == [
        ("full", 1.0),
        ("fp8", 0.5),
        *[(policy, budget) for policy in ("tova", "streaming", "random") for budget in (0.5, 0.1)],
    ]
    assert ("fp8", 0.5) not in grid(fp8=False).points()


def test_an_interrupted_run_has_some_of_everything() -> None:
    seen = list(grid(lengths={512: 4, 1024: 3}, at_most={"common-words": 1}).samples())
    assert len(seen) == len(set(seen)) == 2 * (4 + 3) + 2
    assert {(length, task) for length, task, _ in seen[:11]} == {(n, t) for n in (512, 1024) for t in DOCUMENT["tasks"]}
    assert ("common-words", 1) not in {(task, index) for _, task, index in seen}


def test_two_turns_only_where_there_is_a_second_question() -> None:
    keys = all_keys(grid(lengths={1024: 1}))
    settings = {key.split("/")[1]: set() for key in keys}
    for key in keys:
        settings[key.split("/")[1]].add(key.split("/")[3])
    assert settings == {
        "niah-single": {"aware", "agnostic", "two-turn"},
        "common-words": {"aware", "agnostic"},
        "continuation": {"text"},
    }
    assert len(keys) == len(set(keys)) == (3 + 2 + 1) * 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["niah"]}, "unknown task 'niah'; available: niah-single"),
        ({"at_most": {"niah": 1}}, "unknown task 'niah'"),
        ({"lengths": {100: 1}}, "length 100 is too short for these tasks; allow at least"),
        ({"lengths": {}}, "lengths"),
        ({"budgets": [1.0]}, "budgets"),
        ({"settings": ["blind"]}, "settings"),
        ({"policies": ["full"]}, "policies need names of their own"),
        ({"policies": ["tova", "tova"]}, "policies need names of their own"),
        ({"policy": {"windows": 3}}, "unknown key 'windows' .did you mean 'window'"),
        ({"policies": [{"name": "a", "scorer": "tova", "config": {"window": 0}}]}, "window: got 0"),
        ({"colour": 1}, "colour"),
        ({"solved": {4096: 5}}, "solved names length 4096, which is none of 512, 1024"),
        ({"pairs": [["tova", "nova"]]}, "pairs names 'nova', which is no policy of this grid; there are tova"),
        ({"policies": ["kvzip"]}, "kvzip rates prompts .* policy: {interval: 512} or more it is; got 128"),
    ],
)
def test_bad_grids_say_what_is_allowed(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(GridError, match=rf"(?s)toy\.yaml: .*{said}"):
        grid(**changes)


def test_grids_are_found_read_and_narrowed(tmp_path: Path) -> None:
    assert "smollm2" in grid_files()
    for path in grid_files().values():
        assert load_grid(path).points()
        assert len(all_keys(load_grid(path, quick=True))) < len(all_keys(load_grid(path)))
    with pytest.raises(GridError, match="no grid 'other'; available: .*smollm2"):
        find_grid("other")
    with pytest.raises(GridError, match="cannot read the grid .*No such file"):
        load_grid(find_grid(str(tmp_path / "none.yaml")))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(GridError, match="not valid YAML"):
        load_grid(tmp_path / "bad.yaml")
    small = narrowed(grid(), samples=3, lengths=[512], tasks=["facts"], policies=["snapkv"])
    assert (small.lengths, small.tasks) == ({512: 3}, ("facts",))
    assert [policy.name for policy in small.policies] == ["snapkv", "streaming", "random"]
    assert narrowed(grid(), samples=None, lengths=None, tasks=None, policies=None) == grid()
    half = narrowed(grid(), samples=None, lengths=None, tasks=None, policies=None, budgets=[0.5])
    assert half.budgets == (0.5,)
    with pytest.raises(GridError, match=r"as changed on the command line: budgets\.0: .*less than 1"):
        narrowed(grid(), samples=None, lengths=None, tasks=None, policies=None, budgets=[1.5])


def test_policies_named_on_the_command_line_are_the_grids_own_or_scorers() -> None:
    wide = {"name": "wide", "scorer": "tova", "config": {"window": 32, "recent_tokens": 32}}
    all_ = grid(policies=[wide, "keydiff", "snapkv"], pairs=[["wide", "keydiff"], ["wide", "snapkv"]])
    some = narrowed(all_, samples=None, lengths=None, tasks=None, policies=["wide", "snapkv", "tova"])
    assert some.policies[0] == all_.policies[0] and some.policies[2].scorer == "tova"
    assert some.pairs == (("wide", "snapkv"),)


def test_policies_that_differ_in_more_than_the_scorer_get_engines_of_their_own() -> None:
    wide = {"name": "tova-wide", "scorer": "tova", "config": {"window": 32, "recent_tokens": 32}}
    specs = engine_specs(grid(policies=["tova", wide]))
    assert [spec.name for spec in specs] == ["policies-0", "policies-1", "fp8"]
    assert {policy for policy, _, _ in specs[0].points} == {"full", "tova", "streaming", "random"}
    assert specs[0].config is not None and specs[0].config["scorer"] == "tova"
    assert specs[0].config["request_scorers"] == ["streaming", "random"]
    assert specs[1].config is not None and specs[1].config["window"] == 32
    options = {"deltamem_keep_ratio": 0.5, "deltamem_scorer": "tova", "deltamem_dealing": "global"}
    assert specs[1].points[0] == ("tova-wide", 0.5, options)
    arguments = engine_args(grid(), "model", specs[2])
    assert arguments["kv_cache_dtype"] == "fp8"
    assert "additional_config" not in arguments


def test_a_plain_name_may_say_how_pages_are_dealt() -> None:
    policies = grid(policies=["tova", "tova-equal", "random-profile"]).policies
    assert {one.name: (one.scorer, one.dealing) for one in policies} == {
        "tova": ("tova", "global"),
        "tova-equal": ("tova", "equal"),
        "random-profile": ("random", "profile"),
        "streaming": ("streaming", "equal"),
        "random": ("random", "equal"),
    }
    assert grid().config_of(grid().policies[0])["mode"] == "always"


# ---- encoding ---------------------------------------------------------------------------------------------


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


# ---- a whole run over an engine that answers by rule -------------------------------------------------------


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
