# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Puts the exactness tests' helpers on the path; the repository root must never be there (see setup.py)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from engine_run import EngineHost
    from reference import Reference
    from scenario import Result, Scenario

TESTS = Path(__file__).resolve().parent.parent

for folder in (TESTS / "support", TESTS / "exactness"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture
def report_row(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a row to the table that ``--exactness-report`` writes."""
    from tests.conftest import EXACTNESS

    return request.config.stash.setdefault(EXACTNESS, []).append


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exactness")


@pytest.fixture(scope="session")
def model_path(artefacts: Path) -> Callable[[str], Path]:
    from tiny_models import build_tiny_model, is_tiny

    def path(model: str) -> Path:
        if is_tiny(model):
            return build_tiny_model(model, artefacts / "models")
        from deltamem_vllm.models.catalog import find_model, get_model

        return get_model(find_model(model))

    return path


@pytest.fixture(scope="session")
def run(artefacts: Path, model_path: Callable[[str], Path]) -> Iterator[Callable[[Scenario], Result]]:
    """Runs a scenario once, whatever tests look at it."""
    from engine_run import EngineHost
    from scenario import Scenario

    hosts: dict[int, EngineHost] = {}

    @functools.cache
    def once(scenario_json: str) -> Result:
        scenario = Scenario.from_json(scenario_json)
        if scenario.runner not in hosts:
            hosts[scenario.runner] = EngineHost(scenario.runner)
        return hosts[scenario.runner].run(scenario, model_path(scenario.model), artefacts / scenario.name)

    yield lambda scenario: once(scenario.to_json())
    for host in hosts.values():
        host.close()


@pytest.fixture(scope="session")
def reference(model_path: Callable[[str], Path]) -> Callable[[str], Reference]:
    from reference import Reference

    torch.set_num_threads(1)
    return functools.cache(lambda model: Reference(model_path(model)))
