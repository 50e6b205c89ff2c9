# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the recording engine's tap on a scorer writes down, and what it says of itself to whoever deals pages."""

from __future__ import annotations

import pytest
import torch

from deltamem_vllm.integration.profile_engine import ScoreTap
from deltamem_vllm.scoring.base import ScoreView
from deltamem_vllm.scoring.registry import BUILTIN, available_scorers


def test_views_of_a_few_heads_are_kept_side_by_side() -> None:
    tap = ScoreTap(available_scorers()["keydiff"]())
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(heads, 20, 8, generator=generator) for heads in (3, 3, 6))
    expected = []
    for first, last in ((0, 2), (2, 3)):
        own = slice(first, last)
        view = ScoreView(keys[own], values[own], queries[2 * first : 2 * last, -4:], 0.3, 1, 0, first)
        expected.append(tap.score(view))
    assert sorted(tap.utility) == sorted(tap.attention) == [(1, 0), (1, 2)]
    assert torch.equal(torch.cat([tap.utility[part] for part in sorted(tap.utility)]), torch.cat(expected))
    assert torch.allclose(tap.attention[1, 0].sum(1), torch.ones(2))


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_a_tap_is_dealt_with_like_its_scorer(name: str) -> None:
    scorer = available_scorers()[name]
    tap = ScoreTap(scorer())
    for fact in ("name", "comparable", "profiled", "lasting"):
        assert getattr(tap, fact) == getattr(scorer, fact)
