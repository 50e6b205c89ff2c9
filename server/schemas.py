# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the JSON routes answer. The fields of `Totals` come from the metrics table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from deltamem_vllm.telemetry import METRICS, Metric


def _field(row: Metric) -> tuple[Any, Any]:
    if row.kind == "histogram":
        return Histogram, Field(description=row.help)
    number = int if row.scale == 1 else float
    by_label = f" By {row.label}." if row.label else ""
    return (
        dict[str, number] if row.label else number,  # type: ignore[valid-type]
        Field(description=f"{row.help}{by_label}"),
    )


class _Answer(BaseModel):
    # A field the schema does not know would be dropped in silence.
    model_config = ConfigDict(extra="forbid")


class Histogram(_Answer):
    """Observations by size, as Prometheus counts them."""

    count: int = Field(description="Observations.")
    sum: float = Field(description="Sum of what was observed.")
    buckets: dict[str, int] = Field(description="Observations of at most this size, by upper bound; the last is +Inf.")


def _numbers(name: str, doc: str, kind: Literal["counter", "gauge", "histogram"]) -> type[BaseModel]:
    fields: dict[str, Any] = {row.name: _field(row) for row in METRICS if row.kind == kind and row.side == "engine"}
    return create_model(name, __doc__=doc, __config__=ConfigDict(extra="forbid"), **fields)


if TYPE_CHECKING:  # a type checker cannot follow create_model

    class Counters(BaseModel): ...

    class Levels(BaseModel): ...

    class Histograms(BaseModel): ...

else:
    Counters = _numbers("Counters", "What has been counted since the engine started.", "counter")
    Levels = _numbers("Levels", "What is the case now.", "gauge")
    Histograms = _numbers("Histograms", "What has been observed since the engine started.", "histogram")


class Totals(_Answer):
    """Everything in the metrics table that engines count."""

    counters: Counters
    levels: Levels
    histograms: Histograms


class Pool(_Answer):
    """vLLM's KV block pool."""

    blocks: int = Field(description="Blocks that requests can use.")
    free_blocks: int = Field(description="Blocks no live request holds; they may still be prefix-cache entries.")
    block_tokens: int = Field(description="Tokens per block.")
    block_bytes: int = Field(description="Bytes of one block over all layers, on one tensor-parallel rank.")


class Requests(_Answer):
    """How many live requests there are."""

    running: int = Field(description="Requests that hold KV blocks.")
    waiting: int = Field(description="Requests in the queue.")
    compacted: int = Field(description="Running requests that have been compacted at least once.")


class EngineStats(_Answer):
    """The numbers of one engine."""

    engine: int = Field(description="Data-parallel rank; the `engine` label at /metrics.")
    active: Literal[True] = Field(description="The engine's scheduler runs the policy.")
    totals: Totals
    pool: Pool
    requests: Requests


class Event(_Answer):
    """Something that happened to a request. Never what it says."""

    at: float = Field(description="Unix time in seconds.")
    engine: int | None = Field(description="The engine's number; null if no engine has seen the request.")
    kind: Literal["refused", "skipped", "preempted", "compacted"] = Field(
        description="`refused`: answered with 400 by this API server. `skipped`: a compaction was due and could not be "
        "done. `preempted`: vLLM took its blocks, it is computed again. `compacted`: memory was taken from it."
    )
    reason: str = Field(
        description="As the label of the metric of that kind; of `preempted`, whether it had been `compacted` or was "
        "`dense`."
    )
    request: str | None = Field(
        description="The request's id; null if it was refused before it had one, or to whoever may not see requests."
    )
    detail: str = Field(description="In words, for people.")


class Stats(_Answer):
    """Answer of GET /deltamem/stats."""

    version: str = Field(description="Version of deltamem in the API server.")
    model: str = Field(description="Served model; the `model_name` label at /metrics.")
    uptime_s: float = Field(ge=0, description="Seconds since this API server got its routes.")
    engines: list[EngineStats] = Field(description="One entry per engine, read at the time of the request.")
    refused: dict[str, int] = Field(
        description="Requests that this API server refused, by reason. With several API servers each has its own."
    )
    recent: list[Event] = Field(
        description="The last things that happened in the engines and in this API server, newest first; so many of "
        "each kind that none crowds the others out."
    )

    def without_ids(self) -> Stats:
        """The same, but for which request an event was about."""
        return self.model_copy(update={"recent": [event.model_copy(update={"request": None}) for event in self.recent]})


class Row(_Answer):
    """One live request. Bytes are those of one tensor-parallel rank, as in /deltamem/stats."""

    id: str = Field(description="vLLM's id of the request.")
    status: Literal["running", "waiting", "preempted"]
    mode: Literal["always", "pressure"] | None = Field(description="Null where the policy leaves the request alone.")
    scorer: str | None = Field(description="Which scorer rates its tokens; null as for `mode`.")
    dealing: Literal["global", "profile", "equal"] | None = Field(
        description="How its pages are shared among layers and heads; null as for `mode`."
    )
    prompt_tokens: int
    logical_tokens: int = Field(description="Tokens it has computed, evicted ones included.")
    resident_tokens: int = Field(description="KV slots it holds.")
    kept_share: float = Field(ge=0, le=1, description="Its KV bytes as a share of those of all its tokens.")
    hot_bytes: int = Field(description="KV bytes in full precision.")
    cold_bytes: int = Field(description="KV bytes in fewer bits.")
    cold_tokens: float = Field(description="Tokens in those, as a mean over layers and heads.")
    blocks: int = Field(description="Blocks in its block table.")
    compactions: int = Field(description="How often memory was taken from it.")
    age_s: float = Field(ge=0, description="Seconds since it arrived.")


class EngineRequests(_Answer):
    """The live requests of one engine."""

    engine: int = Field(description="As in /deltamem/stats.")
    total: int = Field(description="Live requests, also those beyond the limit.")
    requests: list[Row] = Field(description="Those that hold most memory, largest first.")


class RequestList(_Answer):
    """Answer of GET /deltamem/requests."""

    version: str = Field(description="Version of deltamem in the API server.")
    model: str = Field(description="Served model.")
    engines: list[EngineRequests] = Field(description="One entry per engine, read at the time of the request.")


class LayerView(_Answer):
    """Answer of GET /deltamem/requests/{id}/layers: what every layer and head holds."""

    request: str = Field(description="The request's id.")
    engine: int
    logical_tokens: int = Field(description="Tokens it has computed; what is not held of them was evicted.")
    layers: int
    kv_heads: int = Field(
        description="Of all tensor-parallel ranks, in order. Where ranks share a kv head, each has its own copy."
    )
    hot_tokens: list[list[float]] = Field(description="Tokens in full precision, [layers][kv_heads].")
    cold_tokens: list[list[float]] = Field(description="Tokens in fewer bits, [layers][kv_heads].")


class State(_Answer):
    """What `event: state` of GET /deltamem/stream carries, read in one piece."""

    at: float = Field(description="Unix time in seconds.")
    stats: Stats
    requests: RequestList


class ConfigAnswer(_Answer):
    """Answer of GET /deltamem/config."""

    policy: Literal["deltamem"] = "deltamem"
    version: str = Field(description="Version of deltamem in the API server.")
    config: dict[str, Any] = Field(description="Every field of the config, defaults filled in.")


class Problem(_Answer):
    """Answer with any status from 400 on; also what `event: error` of the stream carries."""

    reason: str = Field(description="What is wrong and what would help.")
