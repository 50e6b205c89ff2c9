# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""deal_pages on CPU: tokens ranked, pages rated and dealt by the native library.

``deltamem_vllm/dealing`` is what callers use: it checks the arguments, comes here, and does in torch what these
functions return None for: tensors on another device, or no library. Orders, counts and choices are the same to the bit.
Sums of scores are made in float64 and rounded once, torch's in float32: they differ by its rounding.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deltamem_vllm.ops import native


def rank_pages(
    scores: Tensor, lengths: Tensor, block_size: int, sink: int, recent: int
) -> tuple[Tensor, Tensor] | None:
    """Order and utility of `dealing.deal.page_utilities`.

    Parameters
    ----------
    scores: ``[L, H, N]`` floating point.
    lengths: ``[L, H]`` int64, 0 to N.
    block_size: 1 to N.
    sink, recent: 0 or more.

    Returns
    -------
    ``[L, H, N]`` int64 and ``[L, H, N // block_size]`` float32; None if the library cannot do it.
    """
    library = _library_for(scores)
    if library is None:
        return None
    scores, lengths = scores.float().contiguous(), lengths.contiguous()
    *pairs, tokens = scores.shape
    order = torch.empty(scores.shape, dtype=torch.int64)
    utility = torch.empty(*pairs, tokens // block_size, dtype=torch.float32)
    library.deltamem_rank_pages(
        *map(native.pointer, (scores, lengths)),
        *map(native.int64, (lengths.numel(), tokens, block_size, sink, recent)),
        *map(native.pointer, (order, utility)),
    )
    return order, utility


def deal_pages(worth: Tensor, wanted: int) -> Tensor | None:
    """Pages of each pair, as `dealing.deal.deal_pages`.

    Parameters
    ----------
    worth: ``[L, H, P]`` floating point.
    wanted: pages to deal, 0 to ``L * H * P``.

    Returns
    -------
    ``[L, H]`` int64; None if the library cannot do it.

    Raises
    ------
    ValueError: more pages are wanted than there are.
    """
    library = _library_for(worth)
    if library is None:
        return None
    if not 0 <= wanted <= worth.numel():
        raise ValueError(f"0 to {worth.numel()} pages can be dealt, got {wanted}")
    worth = worth.float().contiguous()
    pages = torch.empty(worth.shape[:2], dtype=torch.int64)
    library.deltamem_deal_pages(
        native.pointer(worth), *map(native.int64, (pages.numel(), worth.shape[2], wanted)), native.pointer(pages)
    )
    return pages


def survivors(order: Tensor, pages: Tensor, block_size: int) -> Tensor | None:
    """Which tokens stay, as `dealing.deal.survivors`.

    Parameters
    ----------
    order: ``[L, H, N]`` int64, every row a permutation.
    pages: ``[L, H]`` int64, ``0 <= pages * block_size <= N``.

    Returns
    -------
    ``[L, H, N]`` bool; None if the library cannot do it.

    Raises
    ------
    ValueError: the order names a token that does not exist.
    """
    library = _library_for(order)
    if library is None:
        return None
    order, pages = order.contiguous(), pages.contiguous()
    keep = torch.empty(order.shape, dtype=torch.bool)
    wrong = library.deltamem_survivors(
        *map(native.pointer, (order, pages)),
        *map(native.int64, (pages.numel(), order.shape[2], block_size)),
        native.pointer(keep),
    )
    if wrong:
        raise ValueError(f"order must name tokens 0 to {order.shape[2] - 1} of every pair")
    return keep


def page_mass(scores: Tensor, lengths: Tensor, order: Tensor, block_size: int, sink: int, recent: int) -> Tensor | None:
    """What each page holds of the scores of its pair, as `dealing.deal.page_mass`.

    Parameters
    ----------
    scores, lengths, block_size, sink, recent: as of `rank_pages`.
    order: ``[L, H, N]`` int64 as it returns.

    Returns
    -------
    ``[L, H, N // block_size]`` float32; None if the library cannot do it.

    Raises
    ------
    ValueError: the order names a token that does not exist.
    """
    library = _library_for(scores)
    if library is None:
        return None
    scores, lengths, order = scores.float().contiguous(), lengths.contiguous(), order.contiguous()
    *pairs, tokens = scores.shape
    mass = torch.empty(*pairs, tokens // block_size, dtype=torch.float32)
    wrong = library.deltamem_page_mass(
        *map(native.pointer, (scores, lengths, order)),
        *map(native.int64, (lengths.numel(), tokens, block_size, sink, recent)),
        native.pointer(mass),
    )
    if wrong:
        raise ValueError(f"order must name tokens 0 to {tokens - 1} of every pair")
    return mass


def tier_path(
    worth: Tensor, lengths: Tensor, block_size: int, capacity: int, loss: float, floor: int
) -> tuple[Tensor, Tensor] | None:
    """Gains and hot pages of `dealing.tiers.tier_path`.

    Parameters
    ----------
    worth: ``[L, H, N]`` float32; others are left to torch, which sums them up as they are.
    lengths: ``[L, H]`` int64, ``floor * block_size`` to N.
    block_size, capacity, loss, floor: as there.

    Returns
    -------
    ``[L, H, P]`` float32 and ``[L, H, P + 1]`` int64; None if the library cannot do it.
    """
    library = _library_for(worth) if worth.dtype == torch.float32 else None
    if library is None:
        return None
    worth, lengths = worth.contiguous(), lengths.contiguous()
    *pairs, tokens = worth.shape
    most = -(-tokens // block_size)
    gains = torch.empty(*pairs, most, dtype=torch.float32)
    hot = torch.empty(*pairs, most + 1, dtype=torch.int64)
    library.deltamem_tier_path(
        *map(native.pointer, (worth, lengths)),
        *map(native.int64, (lengths.numel(), tokens, block_size, capacity)),
        ctypes.c_double(loss),
        native.int64(floor),
        *map(native.pointer, (gains, hot)),
    )
    return gains, hot


def _library_for(tensor: Tensor) -> ctypes.CDLL | None:
    return native.library() if tensor.is_cpu else None
