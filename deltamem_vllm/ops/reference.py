# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The definition of every operation, one token at a time. Tests compare the fast versions with these."""

from __future__ import annotations

from collections.abc import Sequence

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


def read_pooled_token(pool: Tensor, layout: PageLayout, page: int, slot: int) -> tuple[Tensor, Tensor]:
    """Key and value ([D] each) in one slot of one page of the whole pool, ``[NP, block_size * 2 * D]``."""
    return pool[page][layout.keys[slot]].clone(), pool[page][layout.values[slot]].clone()


def move_dealt(
    pool: Tensor,
    layout: PageLayout,
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    survivors: Sequence[Tensor],
) -> Tensor:
    """What the pool looks like after a compaction with unequal pages.

    Parameters
    ----------
    pool: ``[NP, block_size * 2 * D]``; not modified.
    source, target: page ids of every pair (layer, head) in resident order; targets may be sources of any pair.
    survivors: of every pair, ``[len(target) * block_size]`` resident indices into its source tokens.

    Returns
    -------
    A new pool: survivor j of a pair stands in slot j % block_size of page target[j // block_size] of that pair.
    """
    size = layout.block_size
    after = pool.clone()
    for pages, places, kept in zip(source, target, survivors, strict=True):
        for j, index in enumerate(kept.tolist()):
            key, value = read_pooled_token(pool, layout, pages[index // size], index % size)
            after[places[j // size]][layout.keys[j % size]] = key
            after[places[j // size]][layout.values[j % size]] = value
    return after
