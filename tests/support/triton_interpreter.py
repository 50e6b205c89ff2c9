# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Triton's interpreter, made to compute with bfloat16. Import before any kernel runs, in a process of its own.

The interpreter (Triton 3.9) keeps a bfloat16 as the 16 bits it is made of, and then multiplies matrices of those bits
as integers, converts integers to bfloat16 without encoding them, and cuts float32 off where a GPU rounds to nearest.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder
_cast, _dot = _builder.cast_impl, _builder.create_dot


def _wide(handle):
    """A handle's numbers as numpy holds them, bfloat16 as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _rounded(numbers):
    """Bits of the bfloat16 nearest to each number."""
    nearest = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).bfloat16()
    return nearest.view(torch.int16).numpy().view(np.uint16)


def cast_impl(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target):
        return _cast(self, src, dst_type)
    data = _wide(src)
    data = _rounded(data) if target == tl.bfloat16 else data.astype(interpreter._get_np_dtype(target))
    return interpreter.TensorHandle(data, target)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    wide = [interpreter.TensorHandle(_wide(h).astype(np.float32), tl.float32) for h in (a, b)]
    return _dot(self, *wide, d, input_precision, max_num_imprecise_acc)


_builder.cast_impl, _builder.create_dot = cast_impl, create_dot
