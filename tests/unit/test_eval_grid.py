# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a grid of `deltamem eval` says and refuses, and which engines it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltamem_vllm.evaluation.eval.grid import GridError, find_grid, grid_files, load_grid, narrowed
from deltamem_vllm.evaluation.eval.plan import all_keys, engine_args, engine_specs
from tests.support.toy_grid import DOCUMENT, grid


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
