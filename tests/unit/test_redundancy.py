# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which entries count as repeats of a better one, and what that costs them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltamem_vllm.dealing.redundancy import discount_repeats


def rotate(keys: Tensor, positions: Tensor) -> Tensor:
    """RoPE in the half layout: element d turns with element d + D / 2."""
    half = keys.shape[-1] // 2
    angle = positions.view(-1, 1) * 10_000.0 ** (-torch.arange(half) / half)
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def facts(heads: int = 2, distinct: int = 300, noise: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Random scores, keys and values of entries that are all said twice, at different positions."""
    gen = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(2):
        said = torch.randn(heads, distinct, 32, generator=gen)
        parts.append(torch.cat([said, said + noise * torch.randn(said.shape, generator=gen)], dim=1))
    keys = rotate(parts[0] + 2.0, torch.arange(2.0 * distinct) + 100)
    return torch.rand(heads, 2 * distinct, generator=gen), keys.to(dtype), parts[1].to(dtype)


def lost(scores: Tensor, after: Tensor) -> Tensor:
    assert (after <= scores).all()
    return after < scores


@pytest.mark.parametrize(("noise", "dtype"), [(0.0, torch.float32), (0.05, torch.float32), (0.0, torch.bfloat16)])
def test_the_worse_of_two_repeats_loses(noise: float, dtype: torch.dtype) -> None:
    scores, keys, values = facts(noise=noise, dtype=dtype)
    after = discount_repeats(scores, keys, values, 0.9)
    first, second = lost(scores, after).chunk(2, dim=1)
    assert not (first & second).any()
    assert (first | second).float().mean() > 0.9
    better = scores[:, :300] > scores[:, 300:]
    assert not (first & better).any() and not (second & ~better).any()


def test_strangers_keep_their_scores() -> None:
    gen = torch.Generator().manual_seed(5)
    scores, keys, values = (torch.rand(2, 999, generator=gen), *torch.randn(2, 2, 999, 32, generator=gen))
    assert torch.equal(discount_repeats(scores, keys, values, 0.8), scores)


@pytest.mark.parametrize("other", ["keys", "values"])
def test_one_of_both_is_not_enough(other: str) -> None:
    scores, keys, values = facts()
    fresh = torch.randn(keys.shape, generator=torch.Generator().manual_seed(9))
    after = discount_repeats(scores, fresh if other == "keys" else keys, fresh if other == "values" else values, 0.8)
    assert torch.equal(after, scores)


def test_a_repeat_keeps_what_its_likeness_leaves() -> None:
    scores, keys, values = facts(noise=0.0)
    after = discount_repeats(scores, keys, values, 0.9)
    gone = lost(scores, after)
    assert (after[gone] < 1e-4 * scores[gone] + 1e-5).all()
    scores, keys, values = facts(noise=0.3, seed=2)
    after = discount_repeats(scores, keys, values, 0.8)
    gone = lost(scores, after)
    share = after[gone] / scores[gone]
    assert len(share) > 50 and (share > 0.01).all() and (share <= 0.2 + 1e-6).all()


def test_only_the_best_of_many_repeats_stays() -> None:
    scores = torch.rand(1, 40, generator=torch.Generator().manual_seed(3))
    keys = rotate(torch.ones(1, 40, 32), torch.arange(40.0))
    after = discount_repeats(scores, keys, torch.ones(1, 40, 32), 0.9)
    assert (after == scores).sum() == 1
    assert after.argmax() == scores.argmax()


def test_no_entry_loses_to_one_that_lost() -> None:
    """Trios of values 20 degrees apart: a is like b and b like c, but c is not like a. One of b and c must stay."""
    gen = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(400, 32, 2, generator=gen)).Q
    angles = torch.tensor([0.0, 20.0, 40.0]).deg2rad()
    trios = axes @ torch.stack([angles.cos(), angles.sin()])  # [400, 32, 3]
    values = trios.transpose(1, 2).reshape(1, 1200, 32)
    scores = torch.rand(1, 400, 3, generator=gen).sort(dim=2, descending=True).values.view(1, 1200)
    after = discount_repeats(scores, torch.ones(1, 1200, 32), values, 0.9)
    best, middle, worst = lost(scores, after).view(400, 3).unbind(1)
    assert not best.any()
    assert middle.sum() > 50 and worst.sum() > 50
    assert not (middle & worst).any()


def test_equal_scores_keep_the_newer_entry() -> None:
    _, keys, values = facts(heads=1)
    scores = torch.ones(1, 600)
    gone = lost(scores, discount_repeats(scores, keys, values, 0.9))[0]
    assert gone[:300].float().mean() > 0.9 and not gone[300:].any()


def test_negative_scores_move_to_the_bottom_of_their_head() -> None:
    scores, keys, values = facts()
    scores = scores - 1.5
    after = discount_repeats(scores, keys, values, 0.9)
    gone = lost(scores, after)
    low = scores.amin(1, keepdim=True)
    assert gone.float().mean() > 0.4
    assert (after >= low - 1e-5).all()
    assert ((after - low)[gone] < 1e-3).all()


def test_scores_that_are_no_numbers_stay() -> None:
    scores, keys, values = facts(heads=1)
    scores[0, :6] = torch.tensor([math.nan, math.inf, -math.inf] * 2)
    after = discount_repeats(scores, keys, values, 0.9)
    assert torch.equal(after[0, :6].nan_to_num(nan=7), scores[0, :6].nan_to_num(nan=7))
    assert after[0, 6:].isfinite().all()
    assert after[0, 301] == pytest.approx(0.0, abs=1e-3)  # it repeats the entry of infinite score


def test_heads_do_not_see_each_other() -> None:
    scores, keys, values = facts(heads=3)
    together = discount_repeats(scores, keys, values, 0.9)
    for head in range(3):
        one = slice(head, head + 1)
        torch.testing.assert_close(together[one], discount_repeats(scores[one], keys[one], values[one], 0.9))


def test_is_a_function_of_its_arguments() -> None:
    scores, keys, values = facts()
    before = [part.clone() for part in (scores, keys, values)]
    state = torch.get_rng_state()
    first = discount_repeats(scores, keys, values, 0.9)
    assert torch.equal(first, discount_repeats(scores, keys, values, 0.9))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, (scores, keys, values), strict=True))


def test_one_entry() -> None:
    assert discount_repeats(torch.ones(2, 1), torch.ones(2, 1, 4), torch.ones(2, 1, 3), 0.5).tolist() == [[1.0], [1.0]]


def test_works_where_no_value_can_be_read() -> None:
    args = (torch.empty(shape, device="meta") for shape in ((2, 50), (2, 50, 8), (2, 50, 8)))
    assert discount_repeats(*args, 0.9).shape == (2, 50)


GOOD = (torch.rand(2, 9), torch.rand(2, 9, 8), torch.rand(2, 9, 8))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((GOOD[0][0], GOOD[1], GOOD[2], 0.9), "scores must be"),
        ((GOOD[0][:, :0], GOOD[1][:, :0], GOOD[2][:, :0], 0.9), "n >= 1"),
        ((GOOD[0], GOOD[1][0], GOOD[2], 0.9), "keys and values"),
        ((GOOD[0], GOOD[1][:, 1:], GOOD[2], 0.9), "like the scores"),
        ((GOOD[0], GOOD[1], GOOD[2][:1], 0.9), "like the scores"),
        ((GOOD[0], GOOD[1][:, :, 1:], GOOD[2], 0.9), "even D"),
        ((*GOOD, 0.0), "above 0"),
        ((*GOOD, 1.01), "at most 1"),
        ((*GOOD, math.nan), "above 0"),
    ],
)
def test_mistakes(args: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        discount_repeats(*args)
