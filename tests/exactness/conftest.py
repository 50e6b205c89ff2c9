# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Puts the exactness tests' helpers on the path; the repository root must never be there (see setup.py)."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent

for folder in (TESTS / "support", TESTS / "exactness"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
