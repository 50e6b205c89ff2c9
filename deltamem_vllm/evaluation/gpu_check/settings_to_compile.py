# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The operations and settings that stand for all others when kernels are only compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.evaluation.gpu_check.launches import Launch, recording
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.triton_kernels import attention, cold_pages, gather, utility
from deltamem_vllm.triton_kernels.attend_pages import attend_pages
from deltamem_vllm.triton_kernels.copy_tokens import copy_tokens
from deltamem_vllm.triton_kernels.decode_page import decode_page
from deltamem_vllm.triton_kernels.encode_keys import encode_keys
from deltamem_vllm.triton_kernels.encode_values import encode_values
from deltamem_vllm.triton_kernels.merge_splits import merge_splits
from deltamem_vllm.triton_kernels.window_outputs import window_outputs
from deltamem_vllm.triton_kernels.window_scores import window_scores

KERNELS = [
    attend_pages,
    merge_splits,
    encode_keys,
    encode_values,
    decode_page,
    copy_tokens,
    window_outputs,
    window_scores,
]
"""Every kernel."""

_SEQUENCES, _PAGES, _WIDTH = 16, 4096, 64


@dataclass(frozen=True)
class Setting:
    """One call of an operation.

    Attributes
    ----------
    operation: its name. variant: which of its uses, such as decoding.
    dtype: of the pool. dim, group, block_size, bits: D, G, slots of a page, bits of cold tokens (0: none).
    """

    operation: str
    variant: str
    dtype: torch.dtype
    dim: int
    group: int
    block_size: int
    bits: int

    def launches(self) -> list[Launch]:
        """What the operation would launch, on tensors without memory."""
        with recording(KERNELS) as launches:
            _CALLS[self.operation](self)
        return launches

    def __str__(self) -> str:
        bits = f", {self.bits} bits" if self.bits else ""
        kind = str(self.dtype).removeprefix("torch.")
        use = f"{self.operation} {self.variant}".strip()
        return f"{use}: {kind}, D {self.dim}, G {self.group}, block {self.block_size}{bits}"


def all_settings() -> list[Setting]:
    """Every kernel; every head size, group, number of bits, block size and dtype at least once."""
    half, half_too, single = torch.bfloat16, torch.float16, torch.float32
    attend = partial(Setting, "paged_attention")
    found = [attend("decode", half, 64, 3, 32, bits) for bits in (0, 8, 4, 2)]
    found += [attend("decode", half, 128, 4, 16, bits) for bits in (0, 4, 2)]
    found += [attend("decode", half, 256, 8, 32, 4), attend("decode", half_too, 128, 8, 64, 4)]
    found += [attend("decode", half, 80, 16, 16, 4), attend("decode", half, 96, 4, 128, 2)]
    found += [attend("decode", single, 64, 1, 32, 4), attend("decode", single, 256, 2, 16, 8)]
    found += [attend("prefill", half, 64, 3, 32, bits) for bits in (0, 4)]
    found += [attend("prefill", half, 128, 4, 16, bits) for bits in (0, 8, 4, 2)]
    found += [attend("prefill", half_too, 128, 8, 64, 4), attend("prefill", single, 64, 1, 32, 4)]
    found += [attend("prefill", half, 256, 8, 32, 0)]
    for name in ("encode_delta", "decode_delta"):
        found += [Setting(name, "", half, 64, 1, 32, bits) for bits in (8, 4, 2)]
        found += [Setting(name, "", single, 80, 1, 16, 4)]
    found += [Setting("gather_pages", "", half, dim, 1, 32, 0) for dim in (80, 128)]
    found += [Setting("page_utility", "", half, dim, group, 32, 0) for dim, group in ((64, 3), (128, 4), (256, 8))]
    return [*found, Setting("page_utility", "", single, 96, 4, 48, 0)]


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _pool(setting: Setting) -> Tensor:
    return _empty(_PAGES, setting.block_size * 2 * setting.dim, dtype=setting.dtype)


def _cold(setting: Setting) -> ColdFormat:
    return ColdFormat(setting.bits, setting.dim, setting.block_size * 2 * setting.dim * setting.dtype.itemsize)


def _attend(setting: Setting) -> None:
    longest, splits = (1, 8) if setting.variant == "decode" else (256, 1)
    query = _empty(_SEQUENCES * longest, setting.group, setting.dim, dtype=setting.dtype)
    attention.paged_attention(
        query,
        _pool(setting),
        make_layout("slot_major", setting.block_size, setting.dim),
        _empty(_SEQUENCES, _WIDTH),
        _empty(_SEQUENCES),
        _empty(_SEQUENCES + 1),
        setting.dim**-0.5,
        torch.empty_like(query),
        cold_format=_cold(setting) if setting.bits else None,
        cold_table=_empty(_SEQUENCES, _WIDTH) if setting.bits else None,
        cold_pages=_empty(_SEQUENCES) if setting.bits else None,
        max_query_len=longest,
        splits=splits,
    )


def _encode(setting: Setting) -> None:
    cold = _cold(setting)
    tokens = _empty(_SEQUENCES, cold.capacity, setting.dim, dtype=setting.dtype)
    raw, numbers = _pool(setting).view(torch.uint8), _empty(_SEQUENCES)
    cold_pages.encode_delta(cold, tokens, tokens, numbers, raw, numbers)


def _decode(setting: Setting) -> None:
    cold_pages.decode_delta(_cold(setting), _pool(setting).view(torch.uint8), _empty(_SEQUENCES), setting.dtype)


def _gather(setting: Setting) -> None:
    layout = make_layout("slot_major", setting.block_size, setting.dim)
    tokens = _empty(_SEQUENCES * setting.block_size)
    gather.gather_pages(_pool(setting), layout, tokens, tokens, _empty(_SEQUENCES))


def _utility(setting: Setting) -> None:
    layout = make_layout("slot_major", setting.block_size, setting.dim)
    queries = _empty(_SEQUENCES, setting.group, 32, setting.dim, dtype=setting.dtype)
    table = _empty(_SEQUENCES, _WIDTH)
    utility.page_utility(queries, _pool(setting), layout, table, _empty(_SEQUENCES), 1.0, splits=4)


_CALLS: dict[str, Callable[[Setting], None]] = {
    "paged_attention": _attend,
    "encode_delta": _encode,
    "decode_delta": _decode,
    "gather_pages": _gather,
    "page_utility": _utility,
}
