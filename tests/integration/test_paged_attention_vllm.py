# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Our attention on CPU reads the pages that vLLM's writer fills, and agrees with vLLM's own kernel."""

from __future__ import annotations

import pytest
import torch

from deltamem_vllm.ops import native
from deltamem_vllm.ops.inputs_attention import make_attention
from deltamem_vllm.ops.layout import probe_layout
from deltamem_vllm.ops.paged_attention import paged_attention

ops = pytest.importorskip("vllm._custom_ops")


def halves(pool: torch.Tensor, block_size: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value cache as vLLM's CPU backend cuts them out of ``[blocks, 1 head, block_size, 2 * D]``."""
    keys, values = pool.view(len(pool), 1, 2 * block_size, dim).chunk(2, dim=2)
    return keys, values


@pytest.mark.skipif(not native.available(), reason="deltamem's native library is not built")
@pytest.mark.parametrize(("isa", "dim", "block_size"), [("vec", 64, 32), ("vec", 128, 64), ("vec16", 80, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_our_kernel_agrees_with_vllms_on_its_own_pages(dtype, isa, dim, block_size):
    def write(key, value, cache, slots):
        cut = halves(cache.view(len(cache), -1), block_size, dim)
        ops.cpu_attn_reshape_and_cache(key, value, *cut, slots, isa)

    layout = probe_layout(write, torch.zeros(1, 1, block_size, 2 * dim, dtype=dtype))
    case = make_attention("keys_transposed", dtype, dim, block_size, 3, [1, 40, 1], [500, 90, 7], seed=dim)
    assert torch.equal(layout.keys, case.hot.keys) and torch.equal(layout.values, case.hot.values)
    pool = case.pool.nan_to_num(0.0)  # vLLM's kernel reads whole pages
    table = case.block_table.clamp(max=len(pool) - 1)
    ours, theirs = torch.empty_like(case.query), torch.empty_like(case.query)
    paged_attention(case.query, pool, layout, table, case.seq_lens, case.query_start_loc, case.scale, ours)
    split = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=3, num_heads=3, num_kv_heads=1, head_dim=dim, seq_lens=case.seq_lens, dtype=dtype,
        query_start_loc=case.query_start_loc, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    keys, values = halves(pool, block_size, dim)
    ops.cpu_attention_with_kv_cache(
        query=case.query, key_cache=keys, value_cache=values, output=theirs, query_start_loc=case.query_start_loc,
        seq_lens=case.seq_lens, scale=case.scale, causal=True, alibi_slopes=None, sliding_window=-1,
        block_table=table, softcap=0.0, scheduler_metadata=split, s_aux=None,
    )  # fmt: skip
    # Both round results to bfloat16, and one of them the weights as well.
    atol = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)
