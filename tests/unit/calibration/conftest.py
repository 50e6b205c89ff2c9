# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Fixtures of the tests of calibration."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.calibration_models import calibration_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model with a tokenizer, for reading only."""
    root = tmp_path_factory.mktemp("models")
    return lambda family: calibration_model(family, root)


@pytest.fixture
def llama(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny("llama"), tmp_path / "llama"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of the test's own, except for the test that needs the embedded model."""
    if "smollm2_path" not in request.fixturenames:
        monkeypatch.setenv("DELTAMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
