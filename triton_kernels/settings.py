# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How much of the work one program of a kernel gets, and the numbers that its pages compile into it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.layout import PageLayout
from deltamem_vllm.triton_kernels.checks import affine

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
HEAD_STEP: Final = 16
MOST_DIM: Final = 256
"""Heads have a multiple of the first of dimensions, up to the second."""

MOST_GROUP: Final = 32
"""Query heads of a kv head."""

MOST_SPLITS: Final = 64
MERGE_CHUNK: Final = 16
"""Splits that are merged at a time."""

_PARTIAL_BYTES = 64 * 2**20
# Programs that keep a GPU's multiprocessors busy while some of them wait for memory.
_PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True)
class Tiling:
    """Sizes of one program.

    Attributes
    ----------
    rows: of queries times heads; tile, cold_tile: tokens read together from hot and cold pages.
    warps, stages: as Triton has them.
    """

    rows: int
    tile: int
    cold_tile: int
    warps: int
    stages: int


def padded(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def attention_tiling(dim: int, itemsize: int, group: int, longest: int, cold: ColdFormat | None) -> Tiling:
    """Sizes for heads of `dim` elements of `itemsize` bytes and at most `longest` queries a sequence.

    Chosen by what the compiler reports (registers, spills and shared memory: docs/results/gpu-kernels.md), not by
    measurements on a GPU.
    """
    wide = padded(dim) * itemsize  # bytes of a row of the tile
    # A tile of cold keys as wide as this leaves no registers for more rows.
    decode = longest * group <= 16 or wide > (512 if cold is None else 256)
    rows = 16 if decode else 64 if wide <= (256 if cold is None else 128) else 32
    tile = 64 if wide <= 256 else 32 if wide <= 512 else 16
    cold_tile = 0
    if cold is not None:
        most = 128 if wide <= 128 else 64 if wide <= 256 else 32 if wide <= 512 else 16
        if not decode:
            most //= 2
        cold_tile = max(16, min(padded(cold.capacity), most))
    narrow = decode and (cold is None or wide <= 128)
    return Tiling(max(rows, padded(group)), tile, cold_tile, 4 if narrow else 8, 3 if wide <= 256 and not cold else 2)


def window_tiling(dim: int, itemsize: int, rows: int) -> Tiling:
    """Sizes for `window_outputs` and the rows of `window_scores`, chosen like those of attention."""
    wide = padded(dim) * itemsize
    tall = min(32 if wide <= 128 else 16, max(16, padded(rows)))
    return Tiling(tall, 32 if wide <= 256 else 16, 0, 4 if wide <= 256 else 8, 2)


@lru_cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def wanted_splits(device: torch.device, programs: int) -> int:
    """Splits that fill the device when there are so many programs without any."""
    return max(1, min(MOST_SPLITS, _PROGRAMS_PER_PROCESSOR * _processors(device) // max(1, programs)))


def most_splits(hot_tokens: int, cold_tokens: int, tiling: Tiling, elements: int) -> int:
    """Splits that still have something to read at full tables, and whose results (float32) take at most 64 MiB."""
    tiles = -(-hot_tokens // tiling.tile)
    if tiling.cold_tile:
        tiles += -(-cold_tokens // tiling.cold_tile)
    return max(1, min(MOST_SPLITS, tiles, _PARTIAL_BYTES // (4 * max(1, elements))))


def page_constants(layout: PageLayout) -> dict[str, int]:
    """Where keys and values are in a hot page, as the kernels' constants.

    Raises
    ------
    ValueError: the layout is not affine.
    """
    constants = {"D": layout.head_size, "D_PADDED": padded(layout.head_size), "BLOCK_SIZE": layout.block_size}
    for part, letter in (("keys", "K"), ("values", "V")):
        base, slot, dim = affine(layout, part)
        constants |= {f"{letter}_BASE": base, f"{letter}_SLOT": slot, f"{letter}_DIM": dim}
    return constants


def cold_constants(cold: ColdFormat | None) -> dict[str, int]:
    """Where everything is in a cold page, as the kernels' constants; zeros where there are none."""
    names = ["bits", "capacity", "page_bytes", "key_codes", "value_codes"]
    names += [f"{part}_{number}" for part in ("key", "value") for number in ("scale", "zero")]
    return {name.upper(): getattr(cold, name) if cold is not None else 0 for name in names}


def attention_constants(
    layout: PageLayout, group: int, pool: Tensor, cold: ColdFormat | None, tiling: Tiling
) -> dict[str, int]:
    """Every constant of `attend_pages` but DIRECT.

    Raises
    ------
    ValueError: the layout is not affine.
    """
    constants = page_constants(layout) | cold_constants(cold)
    return constants | {
        "G": group,
        "ROWS": tiling.rows,
        "TILE": tiling.tile,
        "COLD_TILE": tiling.cold_tile,
        "PAGE_STRIDE": pool.stride(0),
        "PAGE_BYTES": pool.stride(0) * pool.element_size(),
    }
