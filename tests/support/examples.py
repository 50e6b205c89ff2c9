# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How many examples a property is tried with: fewer where each of them takes many times as long."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """``count``, but no more than ``DELTAMEM_MOST_EXAMPLES`` if that is set, as `scripts/sanitize.py` does."""
    return min(count, int(os.environ.get("DELTAMEM_MOST_EXAMPLES", count)))
