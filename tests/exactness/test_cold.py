# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the judge of cold pages would notice: one coded token for another, no coding at all, pages read wrongly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from bounds import FAULT, TOLERANCE
from cold_scenarios import COLD_BATCH, COLD_FULL
from reference import Reference
from scenario import Result, Scenario

Run = Callable[[Scenario], Result]
Judge = Callable[[str], Reference]

MATRIX_ONLY = pytest.mark.matrix


def test_judge_sees_one_coded_token_in_place_of_its_neighbour(run: Run, reference: Judge) -> None:
    """Twice: what stands for the neighbour cannot stand for the token, and log-probs come out different."""
    result, judge = run(COLD_BATCH), reference(COLD_BATCH.model)
    with pytest.raises(AssertionError, match="further away than coding explains"):
        judge.check(result, "coded")
    assert max(check.error for check in judge.check(result, "coded", within_bounds=False)) > FAULT


@pytest.mark.parametrize(
    "scenario", [COLD_BATCH, pytest.param(COLD_FULL, marks=MATRIX_ONLY)], ids=lambda scenario: scenario.name
)
def test_judge_sees_that_tokens_were_coded(scenario: Scenario, run: Run, reference: Judge) -> None:
    """With exact keys and values in place of coded ones it must not agree: also where they have 8 bits."""
    assert max(check.error for check in reference(scenario.model).check(run(scenario), "exact")) > FAULT


def test_judge_sees_one_wrong_survivor_beside_cold_pages(run: Run, reference: Judge) -> None:
    # What later tokens are coded from is wrong then, too: only log-probs are asked.
    checks = reference(COLD_BATCH.model).check(run(COLD_BATCH), "survivor", within_bounds=False)
    assert max(check.error for check in checks) > TOLERANCE


@pytest.mark.parametrize(
    "scenario",
    [
        dataclasses.replace(COLD_BATCH, name="wrong-cold-page", fault="wrong-cold-page"),
        *(
            pytest.param(dataclasses.replace(scenario, name=f"{scenario.name}-{fault}", fault=fault), marks=MATRIX_ONLY)
            for scenario, fault in ((COLD_BATCH, "stale-cold-tables"), (COLD_BATCH, "wrong-page"))
        ),
    ],
    ids=lambda scenario: scenario.name,
)
def test_judge_sees_a_fault_in_cold_reads(scenario: Scenario, run: Run, reference: Judge) -> None:
    # Tokens computed from wrong reads are coded as they are: only log-probs are asked.
    checks = reference(scenario.model).check(run(scenario), within_bounds=False)
    assert max(check.error for check in checks) > FAULT
