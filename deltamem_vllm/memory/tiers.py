# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a request holds in cold pages, as a worker reports it to the scheduler after a compaction."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ColdHeld:
    """Means over the (layer, kv head) pairs of a worker; a block, the scheduler's unit, is a page of each.

    Attributes
    ----------
    blocks: cold pages of a pair; so many of the request's blocks are cold, in bytes.
    tokens: tokens of a pair in them.
    """

    blocks: float
    tokens: float
