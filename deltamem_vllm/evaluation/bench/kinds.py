# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The kinds of scenario: what each measures, and how large its pool and its longest request are.

| kind | what it does |
| --- | --- |
| `throughput` | the same requests, all at once, on stock vLLM and on deltamem in turns |
| `capacity` | requests are added one by one until one has no memory, on either side |
| `latency` | time to first token and per further token against the length of the context, on either side |
| `serving` | two real servers under the traffic of vLLM's own client |
| `compaction` | compactions against prefills, in one engine per scorer |
| `unbounded` | requests longer than the whole pool, one at a time |
| `conversation` | two real servers and a chat that outgrows their pools, through the OpenAI client |
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deltamem_vllm.evaluation.bench.settings import BaseScenario, Strict, Traffic, check_unique

Lengths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class ThroughputScenario(BaseScenario):
    """The same traffic, all requests at once, on stock vLLM and on deltamem."""

    kind: Literal["throughput"]
    traffic: Traffic
    pool_requests: PositiveInt
    """Whole requests that the KV pool holds."""
    compare_outputs: bool = False
    """Whether token ids and log-probabilities of both sides are compared, too. Every request is then in the queue
    before the first step, so that both sides batch alike, and log-probabilities are asked for, which takes time."""

    counts: ClassVar[tuple[str, ...]] = ("preemptions", "compactions")
    """Of deltamem."""
    outputs: ClassVar[tuple[str, ...]] = ("same_tokens", "logprob_difference")
    """Share of requests with the same token ids; largest difference of two log-probabilities of the same token in the
    same context. Only with `compare_outputs`."""
    measures = ("output_tokens_per_s", "output_tokens_per_cpu_s", "max_running", "mean_running", *counts, *outputs)
    """The others are ratios deltamem / stock."""

    @model_validator(mode="after")
    def _compared(self) -> ThroughputScenario:
        named = [target.measure for target in self.targets if target.measure in self.outputs]
        if named and not self.compare_outputs:
            raise ValueError(f"a target names {named[0]}, which needs compare_outputs: true")
        return self

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return self.traffic.tokens

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool, with the null block that vLLM never hands out."""
        return self.pool_requests * self.engine.blocks(self.traffic.tokens) + 1


class CapacityScenario(BaseScenario):
    """Requests are added one by one, each once all before it decode, until a request has no memory.

    At most `engine.max_num_seqs` are added: vLLM runs no more, whatever the memory.
    """

    kind: Literal["capacity"]
    prompt_tokens: PositiveInt
    output_tokens: PositiveInt
    """So many that no request ends while others are added."""
    pool_tokens: PositiveInt
    """Tokens that the KV pool holds, rounded down to whole blocks."""

    measures = ("requests_held", "context_tokens")
    """Ratios deltamem / stock."""

    @model_validator(mode="after")
    def _room(self) -> CapacityScenario:
        if self.pool_tokens < self.max_model_len:
            raise ValueError(
                f"pool_tokens is {self.pool_tokens}, less than one whole request of {self.max_model_len} tokens; "
                "vLLM does not start with that"
            )
        return self

    @property
    def max_model_len(self) -> int:
        """Tokens of a request from its first to its last."""
        return self.prompt_tokens + self.output_tokens

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool, with the null block."""
        return self.pool_tokens // self.engine.block_size + 1


class LatencyScenario(BaseScenario):
    """Rounds of `batch_sizes` requests sent at once, for each prompt length, in a pool with room for all."""

    kind: Literal["latency"]
    prompt_lengths: Lengths
    batch_sizes: Lengths
    decode_tokens: Annotated[int, Field(ge=2)]
    """Tokens per request that the time per token is taken from. All requests decode then."""

    measures = ("first_token_s", "per_token_s", "stall_s")
    """Ratios deltamem / stock."""

    @model_validator(mode="after")
    def _named_once(self) -> LatencyScenario:
        check_unique(self.prompt_lengths)
        check_unique(self.batch_sizes)
        return self

    def output_tokens(self, batch: int, length: int) -> int:
        """Tokens of each request: those that the first ones produce while others are still at their prompts,
        two until the last one's compaction is over, and those that are timed."""
        chunks = -(-batch * length // self.engine.max_num_batched_tokens) + batch if batch > 1 else 0
        return chunks + 2 + self.decode_tokens

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(
            length + self.output_tokens(batch, length) for length in self.prompt_lengths for batch in self.batch_sizes
        )

    @property
    def pool_blocks(self) -> int:
        """Room for the largest round twice: a compaction is a copy, as on a server that has room."""
        return 2 * max(self.batch_sizes) * self.engine.blocks(self.max_model_len) + 1


class ServingScenario(BaseScenario):
    """Traffic of `vllm bench serve` on two real servers."""

    kind: Literal["serving"]
    traffic: Traffic
    pool_requests: PositiveInt
    """Whole requests that each server's KV pool holds."""
    request_rate: PositiveFloat | None = None
    """Requests per second, at Poisson-distributed times. None sends all as fast as `max_concurrency` lets."""
    max_concurrency: PositiveInt | None = None
    """Requests that the client keeps open at once; None sets no limit."""

    measures = (
        "request_throughput",
        "output_throughput",
        "median_ttft_ms",
        "p99_ttft_ms",
        "median_tpot_ms",
        "p99_tpot_ms",
        "median_itl_ms",
        "p99_itl_ms",
    )
    """Ratios deltamem / stock, by the client's names."""

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request. The client's prompts are text and may tokenize a little longer."""
        return self.traffic.tokens + self.engine.block_size

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool, with the null block."""
        return self.pool_requests * self.engine.blocks(self.max_model_len) + 1


class CompactionScenario(BaseScenario):
    """One request at a time: the compaction of its prompt against the prefill of a prompt as long."""

    kind: Literal["compaction"]
    prompt_lengths: Lengths
    scorers: Annotated[tuple[str, ...], Field(min_length=1)]

    measures = ("compaction_share", "scoring_share")
    """Shares of the prefill's seconds."""

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request, which gets two tokens of output."""
        return max(self.prompt_lengths) + 2

    @property
    def pool_blocks(self) -> int:
        """Room for the longest prompt twice: its compaction is a copy, as on a server that has room."""
        return 2 * self.engine.blocks(self.max_model_len) + 1


class Length(Strict):
    """One request."""

    prompt_tokens: PositiveInt
    output_tokens: PositiveInt

    @property
    def tokens(self) -> int:
        """From its first token to its last."""
        return self.prompt_tokens + self.output_tokens


class UnboundedScenario(BaseScenario):
    """Requests one at a time, most of them longer than the whole pool; stock vLLM does not even start with that."""

    kind: Literal["unbounded"]
    pool_tokens: PositiveInt
    """Tokens that the KV pool holds, rounded down to whole blocks."""
    requests: Annotated[tuple[Length, ...], Field(min_length=1)]

    measures = ("pools", "peak_pool_usage", "preemptions")
    """Tokens of the longest request over those of the pool; then the largest of all requests. Of deltamem."""

    @model_validator(mode="after")
    def _named_once(self) -> UnboundedScenario:
        check_unique((request.prompt_tokens, request.output_tokens) for request in self.requests)
        return self

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(request.tokens for request in self.requests)

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool, with the null block."""
        return self.pool_tokens // self.engine.block_size + 1


class ConversationScenario(BaseScenario):
    """One chat whose every turn sends the whole history, on real servers whose pools hold a few turns of it."""

    kind: Literal["conversation"]
    turns: PositiveInt
    message_tokens: PositiveInt
    """Of each user's message, without the chat template's own."""
    reply_tokens: PositiveInt
    pool_turns: PositiveInt
    """Turns that each server's KV pool holds whole."""

    measures = ("answered", "peak_pool_usage")
    """Share of the turns that were answered; largest share of the pool in use. Of deltamem."""

    TEMPLATE_TOKENS: ClassVar[int] = 16
    """Allowed for a chat template in each turn, and for replies that tokenize differently when they are sent back."""
    SYSTEM_TOKENS: ClassVar[int] = 64
    """Allowed for the template's own system message."""

    @property
    def turn_tokens(self) -> int:
        """Tokens that the history grows by in a turn, at most."""
        return self.message_tokens + self.reply_tokens + self.TEMPLATE_TOKENS

    @property
    def max_model_len(self) -> int:
        """Tokens of the last turn with all before it, at most."""
        return self.SYSTEM_TOKENS + self.turns * self.turn_tokens

    @property
    def pool_blocks(self) -> int:
        """Blocks of the pool, with the null block."""
        return self.engine.blocks(self.pool_turns * self.turn_tokens) + 1


Scenario = (
    ThroughputScenario
    | CapacityScenario
    | LatencyScenario
    | ServingScenario
    | CompactionScenario
    | UnboundedScenario
    | ConversationScenario
)
