# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The levels of an engine: what its live requests hold now, and what they would hold without or by the policy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from vllm.v1.request import Request

from deltamem_vllm.integration.manager import DeltaMemManager
from deltamem_vllm.memory.governed import Governed
from deltamem_vllm.telemetry import Telemetry

# Budgets are asked of every request, which costs microseconds each; all other levels are sums of numbers at hand.
BUDGET_EVERY_S = 0.5


class Levels:
    """Measures the gauges of the metrics table.

    Parameters
    ----------
    manager: of the blocks.
    governed: by request id, the requests that the policy applies to; read anew each time.
    telemetry: takes the levels.
    token_bytes: KV bytes of a token, on one tensor-parallel rank.
    """

    def __init__(
        self, manager: DeltaMemManager, governed: Mapping[str, Governed], telemetry: Telemetry, token_bytes: float
    ) -> None:
        self._manager = manager
        self._governed = governed
        self._telemetry = telemetry
        self._token_bytes = token_bytes
        self._budget_at = 0.0

    def measure(self, running: Sequence[Request], everything: bool = False) -> None:
        """Set every level; the budget only if it is due, or if ``everything`` is asked for.

        Parameters
        ----------
        running: of the scheduler.
        everything: measure as of now what is otherwise measured now and then.
        """
        manager, level = self._manager, self._telemetry.level
        logical = sum(r.num_computed_tokens for r in running)
        resident = logical - sum(manager.evicted.values())
        level("logical_tokens", logical)
        level("resident_tokens", resident)
        level("logical_bytes", self._bytes(logical))
        level("resident_bytes", self._bytes(resident))
        held = manager.cold_held()
        cold = held.blocks * manager.block_size * self._token_bytes
        level("tier_bytes", self._bytes(resident) - int(cold), label="hot")  # they add up
        level("tier_bytes", int(cold), label="cold")
        level("cold_tokens", int(held.tokens))
        level("compacted_requests", len(manager.evicted))
        level("dealt_requests", len(manager.dealt))
        level("reserve_blocks", manager.reserve)
        now = time.monotonic()
        # An engine that goes idle says so at once: it sends no levels until it has work again.
        if everything or not running or now - self._budget_at >= BUDGET_EVERY_S:
            self._budget_at = now
            level("budget_bytes", self._bytes(sum(self._budget(request) for request in running)))

    def _budget(self, request: Request) -> int:
        """Tokens that a request would be left with if it were cut to its budget now."""
        logical = request.num_computed_tokens
        resident = logical - self._manager.evicted.get(request.request_id, 0)
        state = self._governed.get(request.request_id)
        if state is None:
            return resident
        return min(state.budget.deserved_tokens(logical, resident, self._manager.block_size, state.curve), resident)

    def _bytes(self, tokens: int) -> int:
        return int(tokens * self._token_bytes)
