# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What `deltamem plan` takes off a card before the pool: weights, graphs, the window, page tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from deltamem_vllm.evaluation.plan.catalog import GIB, find_device, known_devices
from deltamem_vllm.evaluation.plan.formats import FORMATS
from deltamem_vllm.evaluation.plan.geometry import Geometry, load_geometry
from deltamem_vllm.evaluation.plan.memory import (
    Serving,
    captured_sizes,
    default_batch,
    memory_of,
    table_bytes,
    window_bytes,
)

geometry_of: Callable[[str], Geometry] = cache(load_geometry)


def test_parts_of_the_card_add_up() -> None:
    geometry, card = geometry_of("Llama-3.1-8B"), find_device("h100", None)
    serving = Serving(max_num_seqs=1024, batch_tokens=8192)
    memory = memory_of(geometry, card, geometry.weight_bytes(FORMATS["bf16"], 1), serving, window=8)
    assert memory.budget == int(card.total_bytes * 0.92)
    assert memory.tables == 0, "nothing is dealt"
    parts = memory.weights + memory.activations + memory.graphs + memory.other + memory.window + memory.pool
    assert parts == memory.budget
    dealt = memory_of(geometry, card, geometry.weight_bytes(FORMATS["bf16"], 1), serving, 8, dealt_context=4096)
    # 256 blocks, one that is just being started, and two lengths: a number each, for 32 layers of 8 heads.
    assert dealt.tables == 1024 * 32 * 8 * (256 + 1 + 2) * 4 == memory.pool - dealt.pool
    assert memory.weights == 2 * 8_030_261_248
    assert memory.window == (1024 * 8 + 1) * 32 * 128 * 2 * 32
    # vLLM's own log for this model and card, published: about 1.2 GiB for 1024 requests.
    assert 1.1 < memory.activations / GIB < 1.3


def test_captured_sizes_are_vllms_defaults() -> None:
    card = find_device("h100", None)
    assert captured_sizes(card, Serving(max_num_seqs=8)) == [1, 2, 4, 8, 16]
    default = captured_sizes(card, Serving(max_num_seqs=256))
    assert (len(default), default[-1]) == (51, 512)
    assert captured_sizes(card, Serving(eager=True)) == []


def test_rows_of_the_window_cover_padding_for_graphs() -> None:
    geometry, card = geometry_of("Llama-3.1-8B"), find_device("rtx4090", None)
    per_row = 32 * 128 * 2 * 32
    assert window_bytes(geometry, card, Serving(max_num_seqs=16), 8) == (32 * 8 + 1) * per_row
    assert window_bytes(geometry, card, Serving(max_num_seqs=16, eager=True), 8) == (16 * 8 + 1) * per_row
    assert window_bytes(geometry, card, Serving(max_num_seqs=16, ranks=2), 8) == (32 * 8 + 1) * per_row // 2


def test_page_tables_follow_the_longest_request_and_the_ranks_heads() -> None:
    geometry, card = geometry_of("Llama-3.1-8B"), find_device("rtx4090", None)
    per_row = 32 * 8 * 4
    assert table_bytes(geometry, card, Serving(max_num_seqs=16), 8192) == 32 * per_row * (512 + 3)
    assert table_bytes(geometry, card, Serving(max_num_seqs=16), 8193) == 32 * per_row * (513 + 3)
    assert table_bytes(geometry, card, Serving(max_num_seqs=16, ranks=2), 8192) == 32 * per_row * (512 + 3) // 2
    assert table_bytes(geometry, card, Serving(max_num_seqs=16, eager=True), 8192) == 0, "grow as needed"


def test_batch_defaults_follow_the_card() -> None:
    found = {name: default_batch(device) for name, device in known_devices().items()}
    assert found["h100"] == found["h200"] == (8192, 1024)
    assert found["a100-80gb"] == found["rtx4090"] == (2048, 256)
    assert found["b200"] == (16384, 1024)
