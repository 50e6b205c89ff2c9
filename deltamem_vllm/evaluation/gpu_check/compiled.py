# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Compile a kernel for a GPU that need not be there, and ask the assembler what it takes of one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from deltamem_vllm.evaluation.gpu_check.launches import Launch

SHARED_LIMIT: Final = {89: 101_376, 90: 232_448}
"""Bytes of shared memory that one block may have: 99 KiB on sm_89, 227 KiB on sm_90 (CUDA C++ Programming Guide,
compute capabilities)."""

_VERBOSE = {
    "registers": re.compile(r"Used (\d+) registers"),
    "spill_stores": re.compile(r"(\d+) bytes spill stores"),
    "spill_loads": re.compile(r"(\d+) bytes spill loads"),
    "stack": re.compile(r"(\d+) bytes stack frame"),
}


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes
    ----------
    arch: 89 for sm_89.
    registers: a thread. spill_stores, spill_loads, stack: bytes a thread, in local memory.
    shared: bytes a block. threads: of a block.
    tensor_cores: whether the machine code multiplies matrices on them.
    """

    arch: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    threads: int
    tensor_cores: bool


def compile_kernel(launch: Launch, arch: int) -> CompiledKernel:
    """Compile one launch for compute capability ``arch / 10``.

    Raises
    ------
    triton.CompilationError: the kernel is not valid for these constants.
    """
    attributes = {(launch.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, constexprs=launch.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def compile_launch(launch: Launch, arch: int) -> Resources:
    """What a launch takes of a GPU of compute capability ``arch / 10``.

    Raises
    ------
    triton.CompilationError: the kernel is not valid for these constants.
    """
    compiled = compile_kernel(launch, arch)
    ptx = compiled.asm["ptx"]
    figures = _assemble(ptx, arch, bool(launch.options.get("enable_fp_fusion", True)))
    return Resources(
        arch=arch,
        shared=int(compiled.metadata.shared),
        threads=32 * int(compiled.metadata.num_warps),
        tensor_cores="mma" in ptx,
        **figures,
    )


def _assemble(ptx: str, arch: int, fusion: bool) -> dict[str, int]:
    """Registers and spills, from the assembler that Triton itself uses, with its flags."""
    tool = knobs.nvidia.ptxas if arch < 90 else knobs.nvidia.ptxas_blackwell
    named = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    if named is None:
        raise RuntimeError("Triton's PTX names no target; this version of Triton is not understood")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        flags = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={named[1]}"]
        if not fusion:
            flags.append("--fmad=false")
        done = subprocess.run(
            [tool.path, *flags, str(source), "-o", str(source.with_suffix(".o"))],
            capture_output=True,
            text=True,
            check=True,
        )
    found = {name: pattern.search(done.stderr) for name, pattern in _VERBOSE.items()}
    missing = [name for name, match in found.items() if match is None]
    if missing:
        raise RuntimeError(f"{tool.path} -v says nothing of {', '.join(missing)}: {done.stderr!r}")
    return {name: int(match[1]) for name, match in found.items() if match is not None}
