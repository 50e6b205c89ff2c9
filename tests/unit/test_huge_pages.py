# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Huge pages: asked for where they can be had, and nothing lost."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from deltamem_vllm.ops.huge_pages import HUGE, huge_pages_setting, prefer_huge_pages

needs_huge_pages = pytest.mark.skipif(
    huge_pages_setting() == "never", reason="this kernel has no transparent huge pages"
)


def _zeros(size: int) -> torch.Tensor:
    """Zeros in a mapping of their own: what malloc gives may have been advised for an earlier test."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def _fields(memory: torch.Tensor, field: str) -> list[str]:
    """A field of the mappings that hold a tensor, from /proc/self/smaps."""
    first, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    found, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) < end and int(bounds[2], 16) > first
        elif inside and line.startswith(f"{field}:"):
            found.append(line.partition(":")[2])
    return found


@needs_huge_pages
def test_the_kernel_is_asked_and_the_memory_stays_zero_and_writable() -> None:
    memory = _zeros(40 * 2**20)
    # How many the kernel has free is no matter of this test: it looks at the advice ("hg"), not at what came of it.
    assert not any("hg" in flags.split() for flags in _fields(memory, "VmFlags"))
    asked = prefer_huge_pages(memory)
    assert memory.nbytes - 2 * HUGE < asked <= memory.nbytes and asked % HUGE == 0
    assert any("hg" in flags.split() for flags in _fields(memory, "VmFlags"))
    assert not memory.any()
    memory.fill_(3)
    assert bool((memory == 3).all())


@needs_huge_pages
def test_all_of_it_is_there_at_once() -> None:
    memory = _zeros(24 * 2**20)
    asked = prefer_huge_pages(memory)
    assert sum(int(size.split()[0]) for size in _fields(memory, "Rss")) * 1024 >= asked > 0


@needs_huge_pages
def test_what_lies_around_the_memory_is_kept() -> None:
    whole = torch.ones(16 * 2**20, dtype=torch.uint8)
    inner = whole[HUGE // 2 + 4096 : -HUGE // 2 - 12]
    inner.zero_()
    assert prefer_huge_pages(inner) > 0
    assert bool(whole[: HUGE // 2 + 4096].all()) and bool(whole[-HUGE // 2 - 12 :].all()) and not inner.any()


@pytest.mark.parametrize("place", [0, 8 * 2**20 // 2, 8 * 2**20 - 1])
def test_memory_that_holds_something_keeps_it(place: int) -> None:
    memory = torch.zeros(8 * 2**20)
    memory[place] = 1
    assert prefer_huge_pages(memory) == 0
    assert memory[place] == 1 and memory.sum() == 1


def test_a_negative_zero_is_kept() -> None:
    memory = torch.zeros(8 * 2**20)
    memory[HUGE] = -0.0
    assert prefer_huge_pages(memory) == 0 and bool(memory.signbit().any())


def test_memory_must_be_in_one_piece() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        prefer_huge_pages(torch.zeros(64, 64)[:, ::2])


@pytest.mark.parametrize("size", [0, 1, HUGE - 1])
def test_too_little_memory_for_a_huge_page(size: int) -> None:
    assert prefer_huge_pages(torch.zeros(size, dtype=torch.uint8)) == 0


@pytest.mark.parametrize(
    ("text", "means"), [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always")]
)
def test_the_kernels_setting_is_read(tmp_path: Path, text: str, means: str) -> None:
    path = tmp_path / "enabled"
    assert huge_pages_setting(path) == "never"
    path.write_text(text)
    assert huge_pages_setting(path) == means
