# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the scheduler decides in one step and the workers carry out.

These classes travel inside vLLM's ``SchedulerOutput`` (pickled to worker processes), so they hold plain values only.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class CompactionPlan:
    """Keep ``keep`` of a request's ``resident_before`` cached tokens: in every (layer, kv head), or on average.

    The scheduler fixes the count and the blocks; each worker chooses which tokens its own heads keep and, unless
    ``dealing`` is ``equal``, how many pages each of its (layer, kv head) pairs gets. Token counts are nominal: what a
    block table of that many blocks holds. A pair that was dealt more or fewer pages holds more or fewer tokens.

    Attributes
    ----------
    request_id: vLLM's internal request id.
    source_blocks: ids of the blocks that hold the resident tokens, in token order.
    target_blocks: ids of the blocks that receive the survivors, in token order: fresh ones, or the first of
        ``source_blocks`` when ``in_place``.
    blocks_after: the whole block table of the request after this step's allocation; starts with
        ``target_blocks``.
    resident_before: tokens in the source blocks.
    keep: tokens that survive; ``keep < resident_before``. Whole blocks unless ``dealing`` is ``equal``.
    logical_len: tokens the model has seen when the plan was made.
    evicted_before, evicted_after: ``logical_len`` minus the resident tokens, before and after.
    sink_tokens, recent_tokens: resident tokens at either end that must survive, in every pair.
    scorer: name of the scorer that chooses the survivors.
    dealing: how the pages of the target blocks are shared among the pairs: ``equal``, ``profile`` or ``global``.
    serial: numbers the engine's dealt compactions, from 1; 0 for ``equal``. A worker whose page table carries another
        serial would read the wrong pages.
    in_place: survivors are packed to the left inside the source blocks (the pool had no room for a copy).
    cold: pages may be cold.
    """

    request_id: str
    source_blocks: tuple[int, ...]
    target_blocks: tuple[int, ...]
    blocks_after: tuple[int, ...]
    resident_before: int
    keep: int
    logical_len: int
    evicted_before: int
    evicted_after: int
    sink_tokens: int
    recent_tokens: int
    scorer: str
    dealing: str
    serial: int
    in_place: bool
    cold: bool = False


@dataclass(frozen=True)
class Probe:
    """Ask a worker what a request's cached tokens are worth, without moving any.

    Attributes
    ----------
    request_id: vLLM's internal request id.
    source_blocks: ids of the blocks that hold the resident tokens, in token order.
    resident_len, logical_len: tokens, nominal and seen.
    sink_tokens, recent_tokens, scorer, dealing, cold: as in the compaction this is asked for.
    compacted_next: the request is compacted in the same step, which may use what was worked out for the answer.
    """

    request_id: str
    source_blocks: tuple[int, ...]
    resident_len: int
    logical_len: int
    sink_tokens: int
    recent_tokens: int
    scorer: str
    dealing: str
    cold: bool = False
    compacted_next: bool = False


@dataclass(frozen=True)
class StepPlan:
    """Everything a worker must know for one step.

    Attributes
    ----------
    compactions: run in this order: a later one may write blocks that an earlier one freed.
    evicted: request id -> evicted tokens, for every request that has any. The only number by which the resident
        world (sequence lengths, slot mapping, block counts) differs from the logical one (positions).
    dealt: request id -> serial of its last compaction, for every request whose pages were dealt.
    probes: answered before the compactions run.
    """

    compactions: tuple[CompactionPlan, ...] = ()
    evicted: dict[str, int] = field(default_factory=dict)
    dealt: dict[str, int] = field(default_factory=dict)
    probes: tuple[Probe, ...] = ()
