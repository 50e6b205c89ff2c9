# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The block table of every request, followed on the host from what the scheduler sends.

Both runners keep block tables of their own, one of them on the device only. Page tables are made from these lists, so
nothing has to be read back and both runners are served alike.
"""

from __future__ import annotations

from vllm.v1.core.sched.output import SchedulerOutput


class BlockLists:
    """Block ids by request.

    Attributes
    ----------
    of: request id -> block ids in token order, this step's allocation included.
    """

    def __init__(self) -> None:
        self.of: dict[str, list[int]] = {}

    def update(self, output: SchedulerOutput) -> set[str]:
        """Follow one step; call it before a runner sees the step.

        Returns
        -------
        Requests whose list was not merely extended.
        """
        replaced = set(output.finished_req_ids) | set(output.preempted_req_ids or ())
        for request_id in replaced:
            self.of.pop(request_id, None)
        compacted = {plan.request_id: plan for plan in output.deltamem.compactions}  # type: ignore[attr-defined]
        for new in output.scheduled_new_reqs:
            self.of[new.req_id] = list(new.block_ids[0])
            replaced.add(new.req_id)
        cached = output.scheduled_cached_reqs
        for request_id, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if request_id in compacted:
                continue  # its plan holds the whole list
            if request_id in cached.resumed_req_ids:
                assert blocks is not None, "a resumed request gets blocks"
                self.of[request_id] = list(blocks[0])
                replaced.add(request_id)
            elif blocks is not None:
                self.of[request_id].extend(blocks[0])
        for request_id, plan in compacted.items():
            self.of[request_id] = list(plan.blocks_after)
            replaced.add(request_id)  # also where as many blocks as before look like no change
        return replaced
