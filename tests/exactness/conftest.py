# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Puts the exactness tests' helpers on the path; the repository root must never be there (see setup.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent

for folder in (TESTS / "support", TESTS / "exactness"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@pytest.fixture
def report_row(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a row to the table that ``--exactness-report`` writes."""
    from tests.conftest import EXACTNESS

    return request.config.stash.setdefault(EXACTNESS, []).append
