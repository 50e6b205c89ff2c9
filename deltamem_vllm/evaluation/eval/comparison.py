# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which policies at a budget can be told from the best one, sample by sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from deltamem_vllm.evaluation.eval.aggregate import Pair, solved
from deltamem_vllm.evaluation.eval.grid import FULL
from deltamem_vllm.evaluation.eval.tables import Column, EvalTable, Group
from deltamem_vllm.evaluation.statistics import for_best_of, mcnemar, sign_flip_test

Measure = Literal["retention", "drop"]
Standing = Literal["best", "level", "worse"]
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """How a policy stands against the best at the same budget.

    Parameters
    ----------
    standing : str
        `best`; `level`: not distinguishable from the best; `worse`: distinguishable.
    p_value : float
        Of the paired test against the best, corrected for having picked the best; 1 for the best itself.
    """

    standing: Standing
    p_value: float


@dataclass(frozen=True)
class Versus:
    """Two policies on the same questions, of those that the full cache solves.

    Parameters
    ----------
    wins, losses : int
        Questions that only the first solves, and only the second.
    count : int
        Questions that both were asked.
    p_value : float
        Of McNemar's exact test, for this comparison alone.
    """

    wins: int
    losses: int
    count: int
    p_value: float


def versus(table: EvalTable, groups: Iterable[Group], budget: float, mine: str, theirs: str) -> Versus | None:
    """Compare two policies at a budget; None if they share no question."""
    groups = list(groups)
    ours, others = (_samples(table.pairs(groups, Column(name, budget)), "retention") for name in (mine, theirs))
    shared = sorted(ours.keys() & others.keys())
    if not shared:
        return None
    return Versus(
        wins=sum(ours[key] > others[key] for key in shared),
        losses=sum(ours[key] < others[key] for key in shared),
        count=len(shared),
        p_value=mcnemar([ours[key] > 0 for key in shared], [others[key] > 0 for key in shared]),
    )


def compare(table: EvalTable, groups: Iterable[Group], budget: float, measure: Measure) -> dict[str, Comparison]:
    """Compare all policies at a budget with the best of them, over samples that both have.

    Retention is compared by McNemar's exact test on the samples that the full cache solves, the loss of
    log-prob by a sign-flip test. Policies without a value are absent; policies with the best's own value
    are best as well.
    """
    groups = list(groups)
    values: dict[str, float] = {}
    samples: dict[str, dict[tuple[Group, int], float]] = {}
    for column in table.columns:
        if column.budget != budget or column.policy == FULL:
            continue
        found = _samples(table.pairs(groups, column), measure)
        if found:
            samples[column.policy] = found
            values[column.policy] = sum(found.values()) / len(found)
    if not values:
        return {}
    top = max(values.values())
    best = next(policy for policy, value in values.items() if value == top)
    return {policy: _against(samples, policy, best, values[policy] == top, measure) for policy in values}


def _samples(pairs: Mapping[tuple[Group, int], Pair], measure: Measure) -> dict[tuple[Group, int], float]:
    """A value for each sample; higher is better."""
    if measure == "retention":
        return {key: float(solved(pair.row)) for key, pair in pairs.items() if solved(pair.full)}
    return {key: pair.row["gold_logprob"] - pair.full["gold_logprob"] for key, pair in pairs.items()}


def _against(
    samples: Mapping[str, Mapping[tuple[Group, int], float]], policy: str, best: str, ties: bool, measure: Measure
) -> Comparison:
    if ties:
        return Comparison("best", 1.0)
    shared = sorted(samples[policy].keys() & samples[best].keys())
    ours, theirs = ([samples[name][key] for key in shared] for name in (policy, best))
    if not shared:
        return Comparison("level", 1.0)
    if measure == "retention":
        p_value = mcnemar([value > 0 for value in ours], [value > 0 for value in theirs])
    else:
        p_value = sign_flip_test(ours, theirs)
    p_value = for_best_of(len(samples), p_value)
    return Comparison("worse" if p_value < SIGNIFICANCE else "level", p_value)
