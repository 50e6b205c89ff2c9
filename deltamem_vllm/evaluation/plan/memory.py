# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What of a card's memory is left for the KV cache.

Weights are exact. The rest of what vLLM measures at start is estimated here by the formulas below; every estimate is
named so in the output. vLLM's own figure is in its log: "Available KV cache memory".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deltamem_vllm.evaluation.plan.catalog import GIB, Device
from deltamem_vllm.evaluation.plan.geometry import Geometry
from deltamem_vllm.memory.budgets import cdiv

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM 0.32's default of --gpu-memory-utilization: the share of the card that one server takes."""

BLOCK_SIZE = 16
"""vLLM's default on CUDA, in tokens."""

CONCURRENT_BATCHES = 2
"""Batches in flight at once: vLLM schedules one step ahead on a GPU."""

GRAPH_BYTES_PER_LAYER = 126_000
"""Estimate of one layer in one captured CUDA graph. vLLM logs of 8B models: 0.11 GiB for 30 graphs of 32 layers."""

OTHER_BYTES = int(0.35 * GIB)
"""Estimate: CUDA libraries and attention workspaces. vLLM logs report 0.1 to 0.4 GiB outside PyTorch on one card."""

COMMUNICATION_BYTES = int(0.5 * GIB)
"""Estimate: NCCL and all-reduce buffers of each card when there are several."""

LOGIT_BYTES = 10
"""Estimate: each logit in the model's 16 bits, in float32, and once more in float32 for sampling."""


@dataclass(frozen=True)
class Serving:
    """How the server is started.

    Attributes
    ----------
    ranks: cards, one tensor-parallel rank each.
    utilization: --gpu-memory-utilization.
    max_num_seqs: requests in one batch.
    batch_tokens: tokens in one batch (--max-num-batched-tokens).
    block_size: tokens of a KV cache block.
    eager: no CUDA graphs.
    """

    ranks: int = 1
    utilization: float = GPU_MEMORY_UTILIZATION
    max_num_seqs: int = 256
    batch_tokens: int = 2048
    block_size: int = BLOCK_SIZE
    eager: bool = False

    @property
    def chunk_tokens(self) -> int:
        """Most tokens written between two compactions."""
        return CONCURRENT_BATCHES * self.batch_tokens

    def with_seqs(self, max_num_seqs: int) -> Serving:
        return replace(self, max_num_seqs=max_num_seqs)


@dataclass(frozen=True)
class Memory:
    """One card's memory in bytes, by what takes it. All but `budget` and `weights` are estimates."""

    budget: int
    """The card's memory times --gpu-memory-utilization."""
    weights: int
    activations: int
    graphs: int
    other: int
    """Rotary table, CUDA libraries, communication."""
    window: int
    """deltamem's observation window: exact, 0 without deltamem."""
    tables: int
    """deltamem's page tables: exact, 0 without deltamem or CUDA graphs. They grow with --max-model-len."""

    @property
    def estimated(self) -> int:
        return self.activations + self.graphs + self.other

    @property
    def pool(self) -> int:
        """What is left for the KV cache; negative if it does not fit."""
        return self.budget - self.weights - self.estimated - self.window - self.tables


def default_batch(device: Device) -> tuple[int, int]:
    """vLLM 0.32's default --max-num-batched-tokens and --max-num-seqs for a server on this card."""
    if device.gib >= 160:
        return 16384, 1024
    if device.gib >= 70 and not device.name.startswith("a100"):
        return 8192, 1024
    return 2048, 256


def captured_sizes(device: Device, serving: Serving) -> list[int]:
    """Batch sizes for which vLLM 0.32 captures CUDA graphs by default."""
    if serving.eager:
        return []
    largest = min(2 * serving.max_num_seqs, device.capture_limit, serving.batch_tokens)
    sizes = {size for size in (1, 2, 4) if size <= largest}
    sizes |= set(range(8, min(largest + 1, 256), 8)) | set(range(256, largest + 1, 16))
    if serving.batch_tokens <= largest:
        sizes.add(serving.batch_tokens)
    return sorted(sizes)


def batch_rows(device: Device, serving: Serving) -> int:
    """Requests of the largest batch, padding for CUDA graphs included."""
    return max([serving.max_num_seqs, *captured_sizes(device, serving)])


def window_bytes(geometry: Geometry, device: Device, serving: Serving, window: int) -> int:
    """deltamem's observation window on one rank: ``window`` queries for each row of the largest batch, and a spare."""
    rows = batch_rows(device, serving) * window + 1
    heads = geometry.rank_query_heads(serving.ranks)
    return rows * heads * geometry.head_size * 2 * geometry.layers


def table_bytes(geometry: Geometry, device: Device, serving: Serving, max_model_len: int) -> int:
    """deltamem's page tables on one rank: a page number for each block of the longest request, for every row of the
    largest batch and every (layer, kv head), and two lengths.

    With CUDA graphs they have this size from the start, since graphs remember addresses. Without, they grow as needed
    and out of what vLLM left free.
    """
    if serving.eager:
        return 0
    pairs = geometry.layers * geometry.rank_kv_heads(serving.ranks)
    width = cdiv(max_model_len, serving.block_size) + 1
    return batch_rows(device, serving) * pairs * (width + 2) * 4


def activation_bytes(geometry: Geometry, serving: Serving) -> int:
    """Estimate: the larger of a layer's widest moment over a full batch and the logits of all requests.

    The moment: hidden states and residual, gate, up and their product, 16 bits each.
    """
    width = 2 * geometry.hidden + 3 * geometry.intermediate * geometry.experts_per_token // serving.ranks
    layer = serving.batch_tokens * width * 2
    logits = serving.max_num_seqs * geometry.vocabulary * LOGIT_BYTES
    return max(layer, logits)


def graph_bytes(geometry: Geometry, device: Device, serving: Serving) -> int:
    """Estimate: one piecewise graph for each captured size, and one for whole steps up to --max-num-seqs."""
    sizes = captured_sizes(device, serving)
    graphs = len(sizes) + sum(1 for size in sizes if size <= serving.max_num_seqs)
    return graphs * geometry.layers * GRAPH_BYTES_PER_LAYER


def scratch_bytes(geometry: Geometry, serving: Serving, tokens: int) -> int:
    """Estimate: what one compaction of ``tokens`` resident tokens allocates while it runs.

    One layer's keys and values twice, and its attention weights in float32 twice. vLLM does not know of it: it comes
    out of the freed activations and of the memory above --gpu-memory-utilization.
    """
    layer = geometry.rank_kv_heads(serving.ranks) * geometry.head_size * 2 * 2
    return tokens * (2 * layer + 2 * geometry.rank_query_heads(serving.ranks) * 4)


def memory_of(
    geometry: Geometry, device: Device, weights: int, serving: Serving, window: int, dealt_context: int = 0
) -> Memory:
    """One card's memory.

    Parameters
    ----------
    weights: bytes.
    window: the number of observed queries, 0 without deltamem.
    dealt_context: --max-model-len of a server that deals pages, 0 of one that does not.
    """
    rotary = geometry.max_positions * geometry.head_size * 2
    return Memory(
        budget=int(device.total_bytes * serving.utilization),
        weights=weights,
        activations=activation_bytes(geometry, serving),
        graphs=graph_bytes(geometry, device, serving),
        other=rotary + OTHER_BYTES + (COMMUNICATION_BYTES if serving.ranks > 1 else 0),
        window=window_bytes(geometry, device, serving, window) if window else 0,
        tables=table_bytes(geometry, device, serving, dealt_context) if dealt_context else 0,
    )
