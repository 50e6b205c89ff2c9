# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the JSON routes answer. The fields of counters and levels come from the metrics table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from deltamem_vllm.telemetry import METRICS, Metric


def _field(row: Metric) -> tuple[Any, Any]:
    number = int if row.scale == 1 else float
    by_label = f" By {row.label}." if row.label else ""
    return (
        dict[str, number] if row.label else number,  # type: ignore[valid-type]
        Field(description=f"{row.help}{by_label}"),
    )


def _numbers(name: str, doc: str, kind: Literal["counter", "gauge"]) -> type[BaseModel]:
    fields: dict[str, Any] = {row.name: _field(row) for row in METRICS if row.kind == kind and row.side == "engine"}
    return create_model(name, __doc__=doc, __config__=ConfigDict(extra="forbid"), **fields)


if TYPE_CHECKING:  # a type checker cannot follow create_model

    class Counters(BaseModel): ...

    class Levels(BaseModel): ...

else:
    Counters = _numbers("Counters", "What has been counted since the engine started.", "counter")
    Levels = _numbers("Levels", "What is the case now.", "gauge")


class Totals(BaseModel):
    """Everything in the metrics table."""

    counters: Counters
    levels: Levels


class Pool(BaseModel):
    """vLLM's KV block pool."""

    blocks: int = Field(description="Blocks that requests can use.")
    free_blocks: int = Field(description="Blocks no live request holds; they may still be prefix-cache entries.")
    block_tokens: int = Field(description="Tokens per block.")
    block_bytes: int = Field(description="Bytes of one block over all layers, on one tensor-parallel rank.")


class Requests(BaseModel):
    """Live requests."""

    running: int = Field(description="Requests that hold KV blocks.")
    waiting: int = Field(description="Requests in the queue.")
    compacted: int = Field(description="Running requests that have been compacted at least once.")


class EngineStats(BaseModel):
    """The numbers of one engine."""

    # A field the schema does not know would be dropped in silence.
    model_config = ConfigDict(extra="forbid")

    engine: int = Field(description="Data-parallel rank; the `engine` label at /metrics.")
    active: Literal[True] = Field(description="The engine's scheduler runs the policy.")
    totals: Totals
    pool: Pool
    requests: Requests


class Stats(BaseModel):
    """Answer of GET /deltamem/stats."""

    version: str = Field(description="Version of deltamem in the API server.")
    model: str = Field(description="Served model; the `model_name` label at /metrics.")
    engines: list[EngineStats] = Field(description="One entry per engine, read at the time of the request.")


class ConfigAnswer(BaseModel):
    """Answer of GET /deltamem/config."""

    policy: Literal["deltamem"] = "deltamem"
    version: str = Field(description="Version of deltamem in the API server.")
    config: dict[str, Any] = Field(description="Every field of the config, defaults filled in.")


class Unavailable(BaseModel):
    """Answer with status 503."""

    reason: str = Field(description="Why the engines could not be asked.")
