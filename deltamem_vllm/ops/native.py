# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Loads the native CPU library, ``deltamem_vllm/_native.so``, built from ``csrc/`` when the package is installed.

Plain C functions through ctypes: the library knows nothing of torch, so no version of torch makes it stale. Without
it the operations run in plain torch, after one loud warning. A library that does not fit this file is refused.

Environment
-----------
``DELTAMEM_ISA``: ``scalar``, ``avx2``, ``avx512`` or ``avx512bf16``: use less than the machine has.
``DELTAMEM_NATIVE_LIBRARY``: path of another build of the library, such as the one with sanitizers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ISAS: Final = ("scalar", "avx2", "avx512", "avx512bf16")
"""Instruction sets in rising order; a name's place is its number in the library."""

# 16-bit floats are told apart by number; the kernels know no other kinds.
DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_ABI = 5  # DELTAMEM_ABI in csrc/cpu/isa.h
_MEND = (
    "run `make native` in the checkout, or reinstall the package (`pip install --force-reinstall --no-deps ...`) "
    "on a machine with g++"
)
# torch ships its runtime under a name of its own, or brings LLVM's or Intel's, which know the same functions.
_OPENMP = re.compile(r"/lib(g|i)?omp[^/]*\.so[^/]*$")


def library() -> ctypes.CDLL | None:
    """The native library, loaded once; None if it is not there, after a warning.

    Raises
    ------
    RuntimeError: the library is of another version than this package, or cannot be loaded.
    ValueError: ``DELTAMEM_ISA`` names no instruction set, or one that this machine has not.
    """
    return _load()


def available() -> bool:
    """Whether operations on CPU tensors run natively."""
    return library() is not None


def isa() -> str:
    """The instruction set in use, one of `ISAS`; ``"torch"`` without the library."""
    native = library()
    return "torch" if native is None else ISAS[native.deltamem_isa()]


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that this machine has, of `ISAS`; empty without the library."""
    native = library()
    return () if native is None else ISAS[: native.deltamem_isa_supported() + 1]


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Use another instruction set inside a ``with`` block, in the whole process: for tests and benchmarks.

    Raises
    ------
    ValueError: the machine does not have it, or there is no library.
    """
    native = library()
    if native is None or name not in supported_isas():
        raise ValueError(f"this machine has {', '.join(supported_isas()) or 'no native library'}, not {name!r}")
    before = native.deltamem_isa()
    native.deltamem_use_isa(ISAS.index(name))
    try:
        yield
    finally:
        native.deltamem_use_isa(before)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """The address of a tensor's first element. The caller keeps the tensor alive during the call."""
    return ctypes.c_void_p(tensor.data_ptr())


def int64(number: int) -> ctypes.c_int64:
    """A whole number as the library takes it; ctypes would cut a plain one off at 32 bits."""
    return ctypes.c_int64(number)


@functools.cache
def _load() -> ctypes.CDLL | None:
    path = _path()
    if not path.is_file():
        logger.warning(
            "deltamem's native library %s is missing (it is built at install time, which needs g++): scoring, dealing "
            "and operations on cold and on dealt pages fall back to plain torch on CPU, several times slower. To mend "
            "this, %s.",
            path,
            _MEND,
        )
        return None
    try:
        _offer_openmp()
        native = ctypes.CDLL(str(path))
        abi = int(native.deltamem_abi())
        for name in ("deltamem_isa", "deltamem_isa_supported", "deltamem_use_isa", "deltamem_threads"):
            getattr(native, name)
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"deltamem's native library {path} cannot be used: {error}. To mend this, {_MEND}."
        ) from error
    if abi != _ABI:
        raise RuntimeError(
            f"deltamem's native library {path} was built from other sources (interface {abi}, needed {_ABI}). "
            f"To mend this, {_MEND}."
        )
    _check_isa(native)
    return native


def _path() -> Path:
    named = os.environ.get("DELTAMEM_NATIVE_LIBRARY")
    return Path(named) if named else Path(__file__).parents[1] / "_native.so"


def _check_isa(native: ctypes.CDLL) -> None:
    """Refuse what the library would pass over: a wrong name in ``DELTAMEM_ISA``."""
    forced = os.environ.get("DELTAMEM_ISA")
    has = ISAS[: native.deltamem_isa_supported() + 1]
    if forced is not None and forced not in has:
        raise ValueError(
            f"DELTAMEM_ISA is {forced!r}, but this machine has {', '.join(has)}; choose one of them or unset it"
        )


def _offer_openmp() -> None:
    """Let the library find the OpenMP runtime that torch has loaded: it has no dependency on one of its own.

    One that was preloaded is found first in any case, by torch and by us.
    """
    loaded = openmp_runtimes()
    # The system's only if torch was built without OpenMP.
    ctypes.CDLL(loaded[0] if loaded else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def openmp_runtimes() -> list[str]:
    """Files of all OpenMP runtimes in this process; anything but one of them is a mistake."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []  # not Linux
    return sorted({path for line in lines if _OPENMP.search(path := line.split(maxsplit=5)[-1])})
