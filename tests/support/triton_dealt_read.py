# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Reads dealt pages with vLLM's Triton attention, run by Triton's interpreter, and compares with plain attention.

Run in a process of its own (see tests/integration/test_dealt_read_triton.py). Prints one JSON object: the largest
difference, and that of a control in which one page of one pair is another one.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from torch import Tensor
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.integration import backends
from deltamem_vllm.integration.dealt_batch import DealtBatch, DealtRead

LAYERS, HEADS, GROUP, DIM, SIZE, BLOCKS = 2, 2, 3, 32, 16, 40
# Pages of each pair of each request, and tokens behind them; the second request was never compacted.
DEALT = {"a": [[3, 1], [2, 2]], "c": [[1, 5], [4, 2]]}
TAIL = {"a": 5, "b": 37, "c": 18}
QUERIES = {"decode": {"a": 1, "b": 1, "c": 1}, "chunk": {"a": 4, "b": 1, "c": 9}}


def main() -> None:
    torch.manual_seed(0)
    memory = torch.randn(LAYERS, BLOCKS, HEADS, SIZE, 2 * DIM)
    pool = PagePool(list(memory))
    tables = PageTables(pool, max_rows=4, max_width=BLOCKS, fixed=True)
    free = iter(torch.randperm(BLOCKS - 1).add(1).tolist())
    blocks, nominal = {}, {}
    for serial, (name, tail) in enumerate(TAIL.items(), start=1):
        counts = DEALT.get(name)
        first = sum(map(sum, counts)) // (LAYERS * HEADS) if counts else 0
        blocks[name] = [next(free) for _ in range(first + -(-tail // SIZE))]
        nominal[name] = first * SIZE + tail
        if counts:
            ids = pool.ids(torch.tensor(blocks[name][:first])).flatten()
            tables.put(name, serial, first, torch.tensor(counts), ids[torch.randperm(len(ids))])
    results = {}
    for kind, queries in QUERIES.items():
        error = attend(pool, tables, blocks, nominal, queries)
        page = tables.tables(3)[1, 2, 1]
        page[0] = (page[0] + 1) % pool.pages.shape[0]  # the control: a page of another pair
        results[kind] = {"error": error, "control": attend(pool, tables, blocks, nominal, queries, refill=False)}
        tables.forget(["c"])
    print(json.dumps(results))


def attend(
    pool: PagePool,
    tables: PageTables,
    blocks: dict[str, list[int]],
    nominal: dict[str, int],
    queries: dict[str, int],
    refill: bool = True,
) -> float:
    """Largest difference between the kernel's output and plain attention, over all layers."""
    names = list(TAIL)
    if refill:
        tables.fill([(name, blocks[name]) for name in names])
    counts = [queries[name] for name in names]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    batch = DealtBatch(tables, graphs=True, max_seq_len=10 * SIZE)
    total = sum(counts)
    order = None if total == len(names) else batch._order(torch.tensor(starts).numpy(), torch.tensor(counts).numpy())
    lengths = torch.tensor([nominal[name] for name in names], dtype=torch.int32)
    read = DealtRead(
        pages=pool.pages,
        tables=tables.tables(len(names)),
        seq_lens=tables.seq_lens(lengths),
        query_start_loc=batch._query_start_loc(torch.tensor(counts).numpy()),
        order=order,
        max_query_len=max(counts),
        max_seq_len=10 * SIZE,
    )
    impl_class = backends.Observed_TRITON_ATTN.get_impl_cls()  # type: ignore[attr-defined]
    layer = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1), _q_scale=torch.ones(1))
    worst = 0.0
    for index in range(LAYERS):
        impl = impl_class(HEADS * GROUP, DIM, DIM**-0.5, HEADS, None, None, "auto")
        impl.install_page_tables(index)
        query = torch.randn(total, HEADS * GROUP, DIM)
        output = torch.zeros_like(query)
        metadata = stock_metadata(counts, lengths, blocks, names)
        metadata.deltamem_dealt = read
        impl.forward(layer, query, query, query, pool.pages, metadata, output)
        worst = max(
            worst, (output - plain(pool, tables, index, names, blocks, nominal, counts, query)).abs().max().item()
        )
    return worst


def stock_metadata(
    counts: list[int], lengths: Tensor, blocks: dict[str, list[int]], names: list[str]
) -> TritonAttentionMetadata:
    """What vLLM's builder would make of the batch."""
    width = max(map(len, blocks.values()))
    table = torch.tensor([blocks[name] + [0] * (width - len(blocks[name])) for name in names], dtype=torch.int32)
    scratch = torch.zeros(1)
    return TritonAttentionMetadata(
        num_actual_tokens=sum(counts),
        max_query_len=max(counts),
        query_start_loc=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        max_seq_len=int(lengths.max()),
        seq_lens=lengths,
        block_table=table,
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
        seq_threshold_3D=8,
        num_par_softmax_segments=1,
        softmax_segm_output=scratch,
        softmax_segm_max=scratch,
        softmax_segm_expsum=scratch,
        causal=True,
    )


def plain(
    pool: PagePool,
    tables: PageTables,
    layer: int,
    names: list[str],
    blocks: dict[str, list[int]],
    nominal: dict[str, int],
    counts: list[int],
    query: Tensor,
) -> Tensor:
    """Textbook attention of each query head over the tokens of its pair, read page by page."""
    expected, first = torch.zeros_like(query), 0
    for name, count in zip(names, counts, strict=True):
        pages, lengths = tables.source(name, blocks[name], nominal[name])
        for head in range(HEADS):
            length = int(lengths[layer, head])
            slots = pool.pages[pages[layer, head].long(), 0].reshape(-1, 2 * DIM)[:length]
            keys, values = slots[:, :DIM], slots[:, DIM:]
            for q in range(count):
                seen = length - count + q + 1
                for g in range(GROUP):
                    logits = keys[:seen] @ query[first + q, head * GROUP + g] * DIM**-0.5
                    expected[first + q, head * GROUP + g] = logits.softmax(0) @ values[:seen]
        first += count
    return expected


if __name__ == "__main__":
    main()
