# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which kernels an operation launches, and with what: taken from the operation itself, without running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = 16  # bytes; what Triton compiles variants for


@dataclass(frozen=True)
class Launch:
    """One kernel as it would have been compiled at its first launch.

    Attributes
    ----------
    kernel: Triton's, of `triton_kernels/`.
    signature: type of every parameter by name, as Triton writes them.
    constants: values of the constant ones; aligned: names of those that are multiples of 16.
    options: such as `num_warps`.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any]


@contextmanager
def recording(kernels: list[Any]) -> Iterator[list[Launch]]:
    """Inside the block, launches of these kernels are noted down and not run; tensors may be on the meta device.

    Raises
    ------
    RuntimeError: kernels are run by Triton's interpreter in this process, so that there is nothing to compile.
    """
    launches: list[Launch] = []
    for kernel in kernels:
        if not hasattr(kernel, "cache_key"):
            raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process; unset it to compile")
        kernel.run = _recorder(kernel, launches)
    try:
        yield launches
    finally:
        for kernel in kernels:
            del kernel.run  # the class's method is seen again


def _recorder(kernel: Any, launches: list[Launch]) -> Callable[..., None]:
    def record(*given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = kernel.arg_names
        values = dict(zip(names, given, strict=False)) | {k: v for k, v in named.items() if k in names}
        options = {k: v for k, v in named.items() if k not in names}
        signature, constants, aligned = {}, {}, []
        for parameter in kernel.params:
            value = values[parameter.name]
            kind = _kind(value)
            if parameter.is_constexpr or (kind == "i32" and value == 1):
                kind = "constexpr"
                constants[parameter.name] = value
            elif isinstance(value, Tensor) or (kind.startswith("i") and value % _ALIGNED == 0):
                aligned.append(parameter.name)
            signature[parameter.name] = kind
        launches.append(Launch(kernel, signature, constants, tuple(aligned), options))

    return record


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool | str) or value is None:
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"
