# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The definition of every operation, one token at a time. Tests compare the fast versions with these."""

from __future__ import annotations

from torch import Tensor

from deltamem_vllm.ops.layout import PageLayout


def read_token(cache: Tensor, layout: PageLayout, block: int, slot: int, head: int) -> tuple[Tensor, Tensor]:
    """Key and value ([D] each) that one kv head stored in one slot of one block."""
    page = cache[block, head].reshape(-1)
    return page[layout.keys[slot]].clone(), page[layout.values[slot]].clone()


def move_survivors(
    cache: Tensor, layout: PageLayout, source: list[int], target: list[int], survivors: Tensor
) -> Tensor:
    """What a cache looks like after a compaction.

    Parameters
    ----------
    cache: ``[num_blocks, H, block_size, 2 * D]``, one layer; not modified.
    source, target: block ids in token order; they may be the same blocks.
    survivors: ``[H, keep]`` resident indices into the source tokens.

    Returns
    -------
    A new cache: survivor j of head h stands in slot j % block_size of block target[j // block_size]; the slots after
    the last survivor are zero.
    """
    size = layout.block_size
    after = cache.clone()
    for head in range(cache.shape[1]):
        for block in target:
            after[block, head] = 0
    for head in range(cache.shape[1]):
        for j, index in enumerate(survivors[head].tolist()):
            key, value = read_token(cache, layout, source[index // size], index % size, head)
            page = after[target[j // size], head].reshape(-1)
            page[layout.keys[j % size]] = key
            page[layout.values[j % size]] = value
            after[target[j // size], head] = page.view(after.shape[2:])
    return after
