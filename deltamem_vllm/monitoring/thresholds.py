# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The values at which panels change colour and alerts fire: one number for both."""

from __future__ import annotations

POOL_USE = 0.98
"""Share of vLLM's block pool in use. Mode `pressure` starts at `high_watermark`, 0.95 unless set otherwise, so a pool
above this is one that eviction does not get down."""

OVERHEAD = 0.05
"""Seconds a second spent deciding and compacting."""

REFUSED_SHARE = 0.05
"""Share of requests that are answered with 400."""

ABOVE_FLOOR = 0.06
"""Kept share, less what budgets leave at the least, below which requests are taken to be at their floor: the distance
between two bounds of the histogram's buckets, which is as exactly as it tells, and a little more."""

LITTLE_KEPT = 0.5
"""Kept share below which it matters: no task that was measured loses anything worth a message above it."""

KEPT_SHARE = 0.15
"""Share of a request's bytes below which quality was seen to suffer most (docs/results/cold.md: a tenth)."""

MOSTLY = 0.5
"""Share of the requests from which on it is most of them."""
