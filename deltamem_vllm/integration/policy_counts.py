# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the policy counts and remembers of its decisions, where they are made."""

from __future__ import annotations

from typing import Literal

from deltamem_vllm.memory.events import EventRing
from deltamem_vllm.memory.plans import CompactionPlan
from deltamem_vllm.telemetry import Telemetry

Reason = Literal["budget", "pressure", "short"]
"""What makes a compaction due; see the metric `evictions`."""


class PolicyCounts:
    """Counts a decision in all metrics it concerns and remembers it as an event.

    Parameters
    ----------
    telemetry: counts.

    Attributes
    ----------
    events: the last decisions.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.events = EventRing()

    def probed(self) -> None:
        """A worker is asked what a request is worth."""
        self._telemetry.count("probes")

    def compacted(self, plan: CompactionPlan, reason: Reason) -> None:
        """A compaction was planned, and its blocks are accounted for."""
        count = self._telemetry.count
        freed = len(plan.source_blocks) - len(plan.target_blocks)
        count("compactions")
        count("evictions", label=reason)
        count("evicted_tokens", plan.resident_before - plan.keep)
        count("freed_blocks", freed)
        if reason == "pressure":
            count("pressure_blocks", freed)
        self._telemetry.observe("kept_share", plan.keep, plan.logical_len)
        self.events.add(
            "compacted",
            reason,
            plan.request_id,
            "left with {} of {} tokens, blocks freed: {}",
            plan.keep,
            plan.logical_len,
            freed,
        )

    def skipped(self, request_id: str, reason: str, logical_len: int) -> None:
        """A compaction was due and could not be done."""
        self._telemetry.count("skipped", label=reason)
        self.events.add("skipped", reason, request_id, "at {} tokens", logical_len)

    def preempted(self, request_id: str, compacted: bool, blocks: int) -> None:
        """VLLM took a request's blocks."""
        if compacted:
            self._telemetry.count("preempted_compacted")
        reason = "compacted" if compacted else "dense"
        self.events.add("preempted", reason, request_id, "gave back {} blocks and is computed again", blocks)

    def avoided(self, preemptions: int) -> None:
        """Requests that would have been preempted in this step."""
        if preemptions:
            self._telemetry.count("preemptions_avoided", preemptions)
