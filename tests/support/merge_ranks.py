# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Joins what the scheduler planned and what every rank's worker recorded of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from recorded_pages import RecordedPages
from scenario import Compaction


def merge_ranks(plans: list[tuple[int, Any]], directory: Path, ranks: int) -> list[Compaction]:
    """Join the survivors of all ranks along the kv heads, in the order of the plans."""
    recorded = len(list(directory.glob("rank*-*.pt")))
    assert recorded == len(plans) * ranks, f"{len(plans)} plans, but {recorded} compactions on {ranks} ranks"
    compactions: list[Compaction] = []
    freed: set[int] = set()
    dealt: dict[str, RecordedPages] = {}  # of a request's last compaction
    for n, (step, plan) in enumerate(plans):
        parts = [torch.load(directory / f"rank{rank}-{n:05d}.pt") for rank in range(ranks)]
        for part in parts:
            same = (part["request"], part["serial"]) == (plan.request_id, plan.serial)
            assert same, "a worker ran the plans in another order"
        survivors = [sum(heads, []) for heads in zip(*(part["survivors"] for part in parts), strict=True)]
        lengths = [len(head) for heads in survivors for head in heads]
        file = f"survivors-{n:05d}.pt"
        torch.save(survivors, directory / file)
        pages_file, pages = "", {}
        if plan.dealing != "equal":
            pages_file = f"pages-{n:05d}.pt"
            every = [RecordedPages.load(directory / f"pages{rank}-{n:05d}.pt") for rank in range(ranks)]
            recorded_pages = RecordedPages.of_ranks(every)
            recorded_pages.save(directory / pages_file)
            # A request without evicted tokens is at its start, for the first time or after a preemption.
            pages = recorded_pages.counts(dealt.get(plan.request_id) if plan.evicted_before else None)
            pages["lost"] = len(lengths) * plan.logical_len - sum(lengths) - pages["cold_tokens"]
            dealt[plan.request_id] = recorded_pages
        if compactions and compactions[-1].step != step:
            freed.clear()
        compactions.append(
            Compaction(
                step=step,
                request=plan.request_id,
                logical_len=plan.logical_len,
                resident_before=plan.resident_before,
                keep=plan.keep,
                evicted_before=plan.evicted_before,
                evicted_after=plan.evicted_after,
                sink_tokens=plan.sink_tokens,
                recent_tokens=plan.recent_tokens,
                dealing=plan.dealing,
                serial=plan.serial,
                target_blocks=len(plan.target_blocks),
                reused_blocks=len(freed & set(plan.target_blocks)),
                in_place=plan.in_place,
                fewest=min(lengths),
                most=max(lengths),
                file=file,
                pages_file=pages_file,
                **pages,
            )
        )
        freed |= set(plan.source_blocks) - set(plan.target_blocks)
    return compactions
