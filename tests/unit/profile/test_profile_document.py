# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`profile.json`: its packing, the way there and back, and files that are none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deltamem_vllm.evaluation.profile.build import assemble
from deltamem_vllm.evaluation.profile.document import read_profile, write_profile
from deltamem_vllm.evaluation.profile.errors import ProfileError
from deltamem_vllm.evaluation.profile.packing import (
    from_codes,
    from_run_lengths,
    run_lengths,
    to_codes,
    utility_scale,
)
from deltamem_vllm.evaluation.profile.ragged import Ragged
from deltamem_vllm.evaluation.profile.recording import Coded
from tests.support.profile_toy import BLOCK, compaction, make, recording, survivors


@pytest.mark.parametrize("index", [[], [0], [9], [0, 1, 2], [3, 4, 9], list(range(10))])
def test_run_lengths(index: list[int]) -> None:
    lengths = run_lengths(np.array(index, dtype=int), 10)
    assert sum(lengths) == 10
    assert from_run_lengths(lengths).tolist() == index
    assert run_lengths(np.array([3, 4, 9]), 10) == [3, 2, 4, 1]


def test_a_mass_is_coded_on_a_logarithmic_scale_and_a_cosine_on_a_linear_one() -> None:
    rng = np.random.default_rng(0)
    mass = (10 ** -rng.uniform(0, 6, (2, 3, 500))).astype(np.float32)
    cosine = rng.uniform(-1, 1, (2, 3, 500)).astype(np.float32)
    scales = utility_scale(mass), utility_scale(cosine)
    assert [scale["kind"] for scale in scales] == ["log", "linear"]
    assert np.allclose(from_codes(to_codes(mass, scales[0]), scales[0]), mass, rtol=0.01)
    assert np.allclose(from_codes(to_codes(cosine, scales[1]), scales[1]), cosine, atol=0.0011)


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0, 3.0], [0.0, 0.0, 0.0, 7.0], [np.nan, -np.inf, 1.0, 2.0, np.inf]])
def test_utilities_without_a_spread_or_a_number_are_coded(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    scale = utility_scale(array)
    codes = to_codes(array, scale)
    assert codes.min() >= 0 and codes.max() <= 999
    finite = np.isfinite(array)
    assert np.allclose(from_codes(codes, scale)[finite], array[finite], atol=1e-6)


@pytest.mark.parametrize(("dealing", "cold"), [("equal", False), ("global", False), ("global", True)])
def test_json_round_trip(tmp_path: Path, dealing: str, cold: bool) -> None:
    made = make(dealing=dealing, cold=cold)
    write_profile(made, tmp_path / "profile.json")
    read = read_profile(tmp_path / "profile.json")
    assert read.to_json() == made.to_json()
    assert np.array_equal(read.exact_at_end, made.exact_at_end)
    assert np.array_equal(read.coded_at_end, made.coded_at_end)
    assert read.tiered == cold
    for one, other in zip(read.compactions, made.compactions, strict=True):
        assert np.array_equal(one.survivors.values, other.survivors.values)
        assert np.array_equal(one.survivors.counts, other.survivors.counts)
        assert (one.coded is not None) == (other.coded is not None) == cold
        if one.coded is not None and other.coded is not None:
            for part in ("tokens", "sizes", "stay"):
                left, right = getattr(one.coded, part), getattr(other.coded, part)
                assert np.array_equal(left.values, right.values) and np.array_equal(left.counts, right.counts)
    assert np.array_equal(read.utility, made.utility)


@pytest.mark.parametrize(("cold", "most"), [(False, 4_000_000), (True, 5_000_000)])
def test_size_at_8k_tokens(tmp_path: Path, cold: bool, most: int) -> None:
    rng = np.random.default_rng(0)
    utility = (10 ** -rng.uniform(0, 6, (30, 3, 8192))).astype(np.float32)
    small = recording()
    index, coded, dealing = survivors(utility.reshape(-1, 8192), np.full((30, 3), 816)), None, "equal"
    if cold:
        # 240 tokens exact and 18 pages of 116 coded take what 384 do. Scattered at random: the longest runs there are.
        index, dealing = survivors(utility.reshape(-1, 8192), np.full((30, 3), 240)), "global"
        others = [[np.setdiff1d(np.arange(8192), index[layer, head]) for head in range(3)] for layer in range(30)]
        chosen = [[rng.permutation(left)[: 18 * 116].reshape(18, 116) for left in layer] for layer in others]
        tokens = Ragged.of([[np.sort(pages, axis=1).ravel() for pages in layer] for layer in chosen])
        nothing = Ragged(np.zeros(0, dtype=np.int32), np.zeros((30, 3), dtype=np.int64))
        coded = Coded(tokens, Ragged.of([[[116] * 18] * 3] * 30), nothing)
    only = compaction(2, index, 8192, 8192, "tova", dealing, coded)
    big = replace(small, utility=utility, attention=utility, compactions=[only], steps=small.steps[:3])
    facts = {"block_tokens": BLOCK, "policy": {}}
    write_profile(assemble(big, facts, {"marks": []}, {}), tmp_path / "profile.json")
    assert (tmp_path / "profile.json").stat().st_size < most


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*No such file"),
        ("{", "is no JSON"),
        ("[]", "is no profile"),
        ('{"format": "deltamem-profile", "version": 2}', "has version 2, this deltamem reads 3; make it again"),
        ('{"format": "deltamem-profile", "version": 99}', "has version 99, this deltamem reads 3"),
        ('{"format": "deltamem-profile", "version": 3}', "is damaged .KeyError: 'steps'"),
    ],
)
def test_a_file_that_is_no_profile_is_explained(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ProfileError, match=message):
        read_profile(path)
