# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The CUDA kernels that Triton's are compared with do the same work: their source, run on a CPU, gives the same bytes.

A comparison of machine code (`benchmarks/compare_languages.py`) says something only if both sides are right.
"""

from __future__ import annotations

import ctypes
import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.ops.inputs import between_codes

BLOCK, POOL_PAGES = 32, 7
BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
FOLDER = BENCHMARKS / "one_language"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("compare_languages")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("cuda")

    def build(dim: int, bits: int) -> ctypes.CDLL:
        built = folder / f"{dim}_{bits}.so"
        flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
        sizes = [f"-DBITS={bits}", f"-DDIM={dim}", f"-DBLOCK_SIZE={BLOCK}"]
        subprocess.run(["g++", *flags, *sizes, FOLDER / "host_entry.cpp", "-o", built], check=True, timeout=300)
        return ctypes.CDLL(str(built))

    return build


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize(("dim", "bits"), [(64, 8), (64, 4), (64, 2), (128, 4)])
def test_codes_are_the_codecs(library: Callable[[int, int], ctypes.CDLL], dim: int, bits: int) -> None:
    cuda, cold = library(dim, bits), ColdFormat(bits, dim, BLOCK * 4 * dim)
    assert cuda.capacity() == cold.capacity
    generator = torch.Generator().manual_seed(bits * dim)
    keys, values = (torch.randn(4, cold.capacity, dim, generator=generator) * 3 for _ in range(2))
    keys[..., 0] = between_codes(4, cold.capacity, bits, generator)
    keys, values = keys.to(torch.bfloat16), values.to(torch.bfloat16)
    keys[1, 2, 5], keys[0, 1, 7], values[1, 0, 3], values[2, 0, 1] = torch.nan, torch.inf, torch.nan, -torch.inf
    keys[2, :, 9], values[0, 3] = 0.0, 0.0
    counts = torch.tensor([cold.capacity, cold.capacity // 2 + 1, 1, cold.capacity - 1])
    targets = torch.tensor([5, 0, 3, 1])
    raw = torch.zeros(POOL_PAGES, cold.page_bytes, dtype=torch.uint8)
    cuda.host_encode(*map(_at, (keys, values, counts, raw, targets)), 4, POOL_PAGES)
    expected = torch.zeros_like(raw)
    expected[targets] = encode_pages(cold, keys, values, counts)
    assert torch.equal(raw, expected)

    read_keys, read_values = torch.empty_like(keys), torch.empty_like(values)
    read_counts = torch.empty(4, dtype=torch.int64)
    cuda.host_decode(*map(_at, (raw, targets, read_keys, read_values, read_counts)), 4, POOL_PAGES)
    right_keys, right_values, right_counts = decode_pages(cold, expected[targets])
    assert torch.equal(read_keys, right_keys.to(torch.bfloat16))
    assert torch.equal(read_values, right_values.to(torch.bfloat16))
    assert torch.equal(read_counts, right_counts)

    # Another element is another byte, so equal bytes say something.
    keys[3, 0, 0] += 4
    cuda.host_encode(*map(_at, (keys, values, counts, raw, targets)), 4, POOL_PAGES)
    assert not torch.equal(raw, expected)


def test_tokens_arrive(library: Callable[[int, int], ctypes.CDLL]) -> None:
    dim, count_of_tokens = 64, 150
    generator = torch.Generator().manual_seed(1)
    pool = torch.randint(-(2**15), 2**15, (POOL_PAGES, 2, BLOCK, dim), generator=generator, dtype=torch.int16)
    pages = torch.randint(0, POOL_PAGES, (count_of_tokens,), generator=generator, dtype=torch.int32)
    slots = torch.randint(0, BLOCK, (count_of_tokens,), generator=generator, dtype=torch.int32)
    rows = torch.zeros(count_of_tokens + 1, 2, dim, dtype=torch.int16)
    library(dim, 4).host_copy(*map(_at, (pool, rows, pages, slots)), count_of_tokens, POOL_PAGES)
    assert torch.equal(rows[:-1], pool[pages.long(), :, slots.long()])
    assert not rows[-1].any()


def test_instructions_are_counted_up_to_the_slow_path(benchmark: ModuleType) -> None:
    sass = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0030*/                   NOP ;
        $__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath:
        /*0040*/                   FFMA R1, R1, R1, R1 ;
    """
    assert benchmark.count(sass) == (3, 1, 1)


def test_the_source_has_every_kernel_of_the_comparison(benchmark: ModuleType) -> None:
    text = benchmark.SOURCE.read_text(encoding="utf-8")
    assert [name for name in benchmark.KERNELS if f"__global__ void {name}(" not in text] == []
