# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The machine code of the GPU kernels that move and code tokens, from Triton and from CUDA. Needs nvcc, no GPU.

    python benchmarks/compare_languages.py [--dims 64 128] [--bits 8 4 2] [--arches 89 90] [--markdown FILE]

The CUDA side is `one_language/cuda_kernels.cu`, tested on a CPU by tests/unit/triton/test_cuda_kernels.py. Counted are
the instructions of the path that all tokens take; both compilers unroll every loop over tokens, so none is counted once
that runs more often. About a minute.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from triton import knobs

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.evaluation.gpu_check.compiled import compile_kernel, compile_launch
from deltamem_vllm.evaluation.gpu_check.settings_to_compile import Setting

SOURCE = Path(__file__).parent / "one_language" / "cuda_kernels.cu"
BLOCK = 32
THREADS = 128
KERNELS = ("copy_tokens", "encode_keys", "encode_values", "decode_page")

# Multiprocessors, clock (GHz) and bytes a second of the cards that stand for an architecture, as NVIDIA gives them; a
# multiprocessor of either issues four instructions of 32 threads a cycle.
CARDS = {89: ("RTX 4090", 128, 2.52, 1.008e12), 90: ("H100 SXM", 132, 1.98, 3.35e12)}


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel.

    Attributes
    ----------
    registers, spilled: of a thread, the latter in bytes; shared: bytes of a block.
    threads: that work on `elements` elements together. instructions: of each. wide, narrow: how many of them read or
        write the GPU's memory 16 bytes at a time, and fewer.
    """

    registers: int
    spilled: int
    shared: int
    threads: int
    elements: int
    instructions: int
    wide: int
    narrow: int

    @property
    def per_element(self) -> float:
        """Instructions that the threads execute for each element."""
        return self.instructions * self.threads / self.elements


def count(sass: str) -> tuple[int, int, int]:
    """Instructions, wide and narrow accesses of global memory in one kernel's disassembly, up to its slow paths."""
    names: Counter[str] = Counter()
    for line in sass.splitlines():
        if re.match(r"\s*\$?[\w$]*(slowpath|__internal_)[\w$]*:", line):
            break
        if found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            names[found[1]] += 1
    accesses = {name: number for name, number in names.items() if name.startswith(("LDG", "STG"))}
    wide = sum(number for name, number in accesses.items() if ".128" in name)
    total = sum(number for name, number in names.items() if name != "NOP")
    return total, wide, sum(accesses.values()) - wide


def disassemble(cubin: Path) -> dict[str, str]:
    """Disassembly by kernel."""
    tool = Path(knobs.nvidia.ptxas.path).with_name("nvdisasm")
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+).*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _programs(kernel: str, constants: dict[str, int], cold: ColdFormat) -> int:
    """Programs of a Triton kernel that work on one page."""
    if kernel == "encode_keys":
        return -(-cold.head_size // constants["CHANNELS"])
    if kernel == "encode_values":
        return -(-cold.capacity // constants["TOKENS"])
    if kernel == "decode_page":
        return -(-cold.key_row_bytes // (constants["COLD_TILE"] * cold.bits // 8))
    return 1


def _elements(kernel: str, moved: int, cold: ColdFormat) -> int:
    """Elements that they work on: those of `moved` tokens, of one page's keys or values, or of both."""
    of_page = cold.capacity * cold.head_size
    return {"copy_tokens": moved * 2 * cold.head_size, "decode_page": 2 * of_page}.get(kernel, of_page)


def triton_codes(dim: int, bits: int, arch: int, folder: Path) -> dict[str, Code]:
    """What Triton makes of every kernel."""
    cold, cubin = ColdFormat(bits, dim, BLOCK * 4 * dim), folder / "triton.cubin"
    found: dict[str, Code] = {}
    for operation in ("gather_pages", "encode_delta", "decode_delta"):
        setting = Setting(operation, "", torch.bfloat16, dim, 1, BLOCK, 0 if operation == "gather_pages" else bits)
        for launch in setting.launches():
            has, constants, name = compile_launch(launch, arch), launch.constants, launch.kernel.__name__
            if name in found:
                continue  # the way back of a move
            cubin.write_bytes(compile_kernel(launch, arch).asm["cubin"])
            found[name] = Code(
                has.registers,
                has.spill_stores + has.spill_loads,
                has.shared,
                has.threads * _programs(name, constants, cold),
                _elements(name, constants.get("TOKENS", 0), cold),
                *count(disassemble(cubin)[name]),
            )
    return found


def cuda_codes(dim: int, bits: int, arch: int, folder: Path) -> dict[str, Code]:
    """What nvcc makes of every kernel."""
    cold, cubin = ColdFormat(bits, dim, BLOCK * 4 * dim), folder / "cuda.cubin"
    sizes = [f"-DBITS={bits}", f"-DDIM={dim}", f"-DBLOCK_SIZE={BLOCK}"]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", *sizes]
    done = subprocess.run(["nvcc", *flags, SOURCE, "-o", cubin], capture_output=True, text=True, check=True)
    parts = re.split(r"Compiling entry function '(\w+)'", done.stderr)
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    texts = disassemble(cubin)
    tokens = 4096 // dim
    rows = THREADS * 8 // cold.value_row_bytes
    programs = {"encode_values": -(-cold.capacity // max(tokens, rows))}

    def number(name: str, pattern: str) -> int:
        match = re.search(pattern, said[name])
        return int(match[1]) if match else 0

    return {
        name: Code(
            number(name, r"Used (\d+) registers"),
            number(name, r"(\d+) bytes spill stores") + number(name, r"(\d+) bytes spill loads"),
            number(name, r"(\d+) bytes smem"),
            THREADS * programs.get(name, 1),
            _elements(name, tokens, cold),
            *count(texts[name]),
        )
        for name in KERNELS
    }


def issue_share(code: Code, element_bytes: float, arch: int) -> float:
    """Share of a card's instruction slots that a kernel needs while it reads and writes as fast as the memory can."""
    _, processors, clock, bandwidth = CARDS[arch]
    return code.per_element / 32 / (processors * 4 * clock * 1e9) / (element_bytes / bandwidth)


HEADER = (
    "| kernel | D | bits | GPU | language | registers | spilled | shared | instructions an element "
    "| accesses of 16 bytes, of fewer | share of instruction slots |\n"
    "| --- | ---: | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def rows(dim: int, bits: int, arch: int) -> list[str]:
    """Lines of the table."""
    cold = ColdFormat(bits, dim, BLOCK * 4 * dim)
    coded = cold.page_bytes / (2 * cold.capacity * dim)
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "Triton": triton_codes(dim, bits, arch, Path(folder)),
            "CUDA": cuda_codes(dim, bits, arch, Path(folder)),
        }
    lines = []
    for name in KERNELS:
        if name == "copy_tokens" and bits != 4:
            continue  # it has no codes
        for language, codes in sides.items():
            code = codes[name]
            share = issue_share(code, 4.0 if name == "copy_tokens" else 2 + coded, arch)
            lines.append(
                f"| `{name}` | {dim} | {'' if name == 'copy_tokens' else bits} | sm_{arch} | {language} "
                f"| {code.registers} | {code.spilled} | {code.shared} | {code.per_element:.1f} "
                f"| {code.wide}, {code.narrow} | {share:.0%} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], choices=[64, 128])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2], choices=[8, 4, 2])
    parser.add_argument("--arches", type=int, nargs="+", default=[89, 90], choices=[89, 90])
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        sys.exit("compare_languages: there is no nvcc on the PATH; CUDA's compiler is one half of the comparison")
    lines = [HEADER]
    for arch in options.arches:
        for dim in options.dims:
            for bits in options.bits:
                lines += rows(dim, bits, arch)
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
