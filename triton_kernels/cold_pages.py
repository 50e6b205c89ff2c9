# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Write tokens into cold pages and read them back on a GPU: the same bytes as `codec/cold_codec.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import HEADER_BYTES, ColdFormat
from deltamem_vllm.triton_kernels.checks import check_numbers, check_raw
from deltamem_vllm.triton_kernels.decode_page import decode_page
from deltamem_vllm.triton_kernels.encode_keys import encode_keys
from deltamem_vllm.triton_kernels.encode_values import encode_values
from deltamem_vllm.triton_kernels.settings import DTYPES, cold_constants, padded

# Elements of one program's tile.
_TILE = 4096


def encode_delta(cold: ColdFormat, keys: Tensor, values: Tensor, counts: Tensor, raw: Tensor, targets: Tensor) -> None:
    """Write tokens into cold pages. Never waits for the device.

    Parameters
    ----------
    cold: format of the pages.
    keys, values: ``[p, C, D]`` contiguous float32, bfloat16 or float16; what stands past a page's tokens is ignored.
    counts: ``[p]`` int32 or int64, tokens of each page, 1 to C; others are cut to 0 to C.
    raw: ``[num_pages, page_bytes]`` uint8, the pool as bytes; modified.
    targets: ``[p]`` int32 or int64, distinct ids of the pages to write; numbers of no page are left out.

    Raises
    ------
    ValueError: a shape or dtype does not fit.
    """
    check_raw(raw, cold.page_bytes)
    count = targets.numel()
    shape = (count, cold.capacity, cold.head_size)
    for name, part in (("keys", keys), ("values", values)):
        if tuple(part.shape) != shape or part.dtype not in DTYPES or not part.is_contiguous():
            raise ValueError(
                f"{name} of {count} cold pages must be contiguous {shape} in {', '.join(map(str, DTYPES))}, "
                f"got {part.dtype} {tuple(part.shape)} with strides {part.stride()}"
            )
    check_numbers("counts", counts, count)
    check_numbers("targets", targets, count)
    if not count:
        return
    constants = cold_constants(cold) | {"PAGE_BYTES": raw.stride(0)}
    common = {name: constants[name] for name in ("BITS", "CAPACITY", "PAGE_BYTES")} | {"D": cold.head_size}
    # The division and the order of roundings decide the last bit: no fused multiply-adds.
    options = {"enable_fp_fusion": False}
    tokens = padded(cold.key_row_bytes)
    # A channel's range is found across threads: half as many threads with twice the tokens take fewer instructions.
    channels = max(8, min(128, padded(cold.head_size), 2 * _TILE * cold.bits // (8 * tokens)))
    encode_keys[count, -(-cold.head_size // channels)](
        keys,
        counts,
        raw,
        targets,
        raw.shape[0],
        **common,
        **{name: constants[name] for name in ("KEY_SCALE", "KEY_ZERO", "KEY_CODES")},
        USED_BYTES=cold.value_codes + cold.capacity * cold.value_row_bytes,
        ALL_BYTES=cold.page_bytes,
        HEADER=HEADER_BYTES,
        CHANNELS=channels,
        TOKENS=tokens,
        num_warps=2,
        **options,
    )
    row = padded(cold.value_row_bytes)
    together = max(8, min(64, _TILE // row))
    encode_values[count, -(-cold.capacity // together)](
        values,
        counts,
        raw,
        targets,
        raw.shape[0],
        **common,
        **{name: constants[name] for name in ("VALUE_SCALE", "VALUE_ZERO", "VALUE_CODES")},
        TOKENS=together,
        BYTES=row,
        num_warps=4,
        **options,
    )


def decode_delta(cold: ColdFormat, raw: Tensor, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Read the tokens of cold pages. Never waits for the device.

    Parameters
    ----------
    cold: format of the pages.
    raw: ``[num_pages, page_bytes]`` uint8, the pool as bytes.
    ids: ``[p]`` int32 or int64, pages to read; they may repeat. Numbers of no page are cut to one.
    dtype: of the result: float32, bfloat16 or float16. Numbers are worked out in float32 and rounded once.

    Returns
    -------
    Keys and values, ``[p, C, D]``, zeros past a page's tokens, and the tokens of each page, ``[p]`` int64: what the
    header says, but no less than 0 and no more than C.

    Raises
    ------
    ValueError: a shape or dtype does not fit.
    """
    check_raw(raw, cold.page_bytes)
    check_numbers("ids", ids, ids.numel())
    if dtype not in DTYPES:
        raise ValueError(f"cold pages are read as {', '.join(map(str, DTYPES))}, not {dtype}")
    shape = (ids.numel(), cold.capacity, cold.head_size)
    keys, values = (torch.empty(shape, dtype=dtype, device=raw.device) for _ in range(2))
    counts = torch.empty(shape[0], dtype=torch.int64, device=raw.device)
    if not shape[0]:
        return keys, values, counts
    wide = padded(cold.head_size)
    tile = max(16, min(padded(cold.capacity), _TILE // wide))
    part = tile * cold.bits // 8
    decode_page[shape[0], -(-cold.key_row_bytes // part)](
        raw,
        ids,
        keys,
        values,
        counts,
        raw.shape[0],
        **(cold_constants(cold) | {"PAGE_BYTES": raw.stride(0)}),
        D=cold.head_size,
        D_PADDED=wide,
        COLD_TILE=tile,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return keys, values, counts
