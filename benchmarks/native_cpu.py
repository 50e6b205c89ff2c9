# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""GB/s of the native codecs and of moving tokens, against copying as many bytes, and against the torch versions.

Bytes are what an operation must read and write at least once: the tokens that are moved, or the tokens and the coded
part of their pages. The ceiling is memcpy of half as many (it reads and writes each) by the same threads. Memory comes
in lines of 64 bytes, though, and where the elements of a token are spread, as keys that are transposed, a line is read
for the few bytes of it that are wanted. "In lines" counts what the memory has to deliver: all 64 bytes of every line
that holds something to read, once, and of every line written. "Of memcpy" says how much of a copy's speed arrives at
the tokens, "in lines" how much of the memory's speed is used. Moves in place put each head's survivors into the first
pages of the next head. Dense gathers and decoding write to memory that is there already; torch's versions get theirs on
every call. Pools and both sides of the copy lie in huge pages, as a server's pool does. All versions take turns, so
that a noisy machine is noisy for all; figures are medians, ratios those of the rounds' ratios.

    .venv/bin/python benchmarks/native_cpu.py [--threads 2] [--isa avx2] [--bits 4] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pools import as_in_a_server
from report import Report

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.ops import native
from deltamem_vllm.ops.cold import decode_delta, encode_delta, encode_from
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.ops.inputs_cold import make_cold_tokens, put_in_pool
from deltamem_vllm.ops.layout import PageLayout

LINE = 64  # bytes that a processor reads at once


@dataclass(frozen=True)
class Case:
    """One operation: its bytes, the bytes of all lines that hold some of them, and both versions of it."""

    name: str
    moved: int
    lines: int
    ours: Callable[[], object]
    torchs: Callable[[], object]


def main() -> None:
    args = parse()
    out = Report("Codecs and moves on a CPU", (__doc__ or "").split("\n\n")[1], args.markdown)
    for threads in args.threads:
        torch.set_num_threads(threads)
        with native.using_isa(args.isa or native.isa()):
            out.add(
                f"\n## {threads} thread(s), {native.isa()}\n\nHeads of {args.dim} dims, blocks of {args.block} tokens, "
                f"bfloat16, {args.mebibytes} MiB of tokens in each operation, medians of {args.rounds} rounds.\n"
            )
            out.add(f"| {'operation':36} | MB   | GB/s | of memcpy | in lines | torch GB/s | times torch |")
            out.add("| :--- | ---: | ---: | ---: | ---: | ---: | ---: |")
            for case in [*cold_cases(args), *move_cases(args)]:
                report(case, args.rounds, out)
    out.close()


def report(case: Case, rounds: int, out: Report) -> None:
    source = as_in_a_server(torch.randint(0, 255, (case.moved // 2,), dtype=torch.uint8))
    target = as_in_a_server(torch.zeros_like(source))
    turns = {"ours": case.ours, "copy": lambda: target.copy_(source), "torch": case.torchs}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(rounds + 1):
        for name, call in turns.items():
            began = time.perf_counter()
            call()
            if turn:  # the first touches fresh memory
                seconds[name].append(time.perf_counter() - began)
    ours, torchs = (case.moved / statistics.median(seconds[name]) / 1e9 for name in ("ours", "torch"))
    of_copy, of_torch = (
        statistics.median(other / own for own, other in zip(seconds["ours"], seconds[name], strict=True))
        for name in ("copy", "torch")
    )
    out.add(
        f"| {case.name:36} | {case.moved / 1e6:4.0f} | {ours:4.1f} | {of_copy:9.0%} "
        f"| {of_copy * case.lines / case.moved:8.0%} | {torchs:10.2f} | {of_torch:11.1f} |"
    )


def cold_cases(args: argparse.Namespace) -> list[Case]:
    """Both codecs between dense tokens and pages, and from hot pages to cold ones."""
    dtype, cases = torch.bfloat16, []
    for bits in args.bits:
        page_bytes = args.block * 2 * args.dim * dtype.itemsize
        pages = max(1, args.mebibytes * 2**20 * bits // 16 // page_bytes)
        case = make_cold_tokens("normal", bits, args.dim, args.block, pages, dtype, args.seed, full=True)
        cold, keys, values, counts = case.cold, case.keys, case.values, case.counts
        raw = as_in_a_server(torch.zeros(pages, page_bytes, dtype=torch.uint8))
        ids = torch.randperm(pages)
        moved = 2 * keys.numel() * dtype.itemsize + pages * page_bytes
        encode_delta(cold, keys, values, counts, raw, ids)
        # Into memory that is there already: fresh pages of the operating system cost more than decoding.
        keys_out, values_out, counts_out = torch.empty_like(keys), torch.empty_like(values), torch.empty_like(counts)
        out = (keys_out, values_out, counts_out)
        cases += [
            Case(
                f"encode_delta, {bits} bits, C {cold.capacity}",
                moved,
                moved,
                lambda a=(cold, keys, values, counts, raw, ids): encode_delta(*a),
                lambda a=(cold, keys, values, counts): encode_pages(*a),
            ),
            Case(
                f"decode_delta, {bits} bits",
                moved,
                moved,
                lambda a=(cold, raw, ids, dtype, out): decode_delta(*a),
                lambda a=(cold, raw): [part.to(dtype) for part in decode_pages(*a)[:2]],
            ),
        ]
        for layout in args.layouts:
            there = put_in_pool(case, layout, args.block, args.seed)
            there = replace(there, pool=as_in_a_server(there.pool))
            mover = DealtPages(there.layout)

            def in_torch(there=there, mover=mover, cold=cold, counts=counts) -> object:
                page, slot = there.pages.flatten(), there.slots.flatten()
                dense = [
                    part.view(-1, cold.capacity, cold.head_size)
                    for part in (mover._gather(there.pool, name, page, slot) for name in ("keys", "values"))
                ]
                return encode_pages(cold, *dense, counts)

            cases.append(
                Case(
                    f"encode_from, {bits} bits, {layout}",
                    moved,
                    lines_read(there.pool, there.layout, there.pages, there.slots) + pages * page_bytes,
                    lambda a=(there.pool, there.layout, cold, there.pages, there.slots, counts, there.spare): (
                        encode_from(*a)
                    ),
                    in_torch,
                )
            )
    return cases


def lines_read(pool: torch.Tensor, layout: PageLayout, page: torch.Tensor, slot: torch.Tensor) -> int:
    """Bytes of the lines that hold these tokens of a pool whose pages begin lines."""
    size = pool.element_size()
    of_slots = torch.zeros(layout.block_size, -(-pool.shape[1] * size // LINE))
    for offsets in (layout.keys, layout.values):
        of_slots.scatter_(1, offsets * size // LINE, 1.0)
    wanted = torch.zeros(pool.shape[0], layout.block_size)
    wanted[page.flatten(), slot.flatten()] = 1.0
    return int((wanted @ of_slots > 0).sum()) * LINE


def move_cases(args: argparse.Namespace) -> list[Case]:
    """Survivors from page to page: all of a page's tokens, and a quarter of them, as after an eviction."""
    cases = []
    generator = torch.Generator().manual_seed(args.seed)
    page_numbers = args.block * 2 * args.dim
    for layout in args.layouts:
        for share in (1.0, 0.25):
            targets = args.mebibytes * 2**20 // (2 * page_numbers)
            hot = round(targets / share)
            pool = torch.randn(hot + targets, page_numbers, dtype=torch.bfloat16, generator=generator)
            pool = as_in_a_server(pool)
            order = torch.randperm(hot + targets, generator=generator)
            kept = torch.randperm(hot * args.block, generator=generator)[: targets * args.block].sort().values
            page, slot = order[kept // args.block], kept % args.block
            paged = make_layout(layout, args.block, args.dim)
            mover = DealtPages(paged)
            moved = 2 * targets * page_numbers * 2
            lines = lines_read(pool, paged, page, slot) + moved // 2
            # In place, as pages are dealt: each head's survivors into the first pages of the head after it.
            heads = math.gcd(targets, hot, 64)
            first = order[:hot].view(heads, -1)[:, : targets // heads].roll(-1, 0).flatten()
            for in_place, to in ((False, order[hot:]), (True, first)):

                def in_torch(pool=pool, page=page, slot=slot, to=to, mover=mover) -> None:
                    mover.scatter(pool, to, *(mover._gather(pool, name, page, slot) for name in ("keys", "values")))

                cases.append(
                    Case(
                        f"move {share:.0%}, {layout}{', in place' if in_place else ''}",
                        moved,
                        lines,
                        lambda a=(pool, page, slot, to, in_place), mover=mover: mover.move(*a),
                        in_torch,
                    )
                )
            out = tuple(torch.empty(len(page), args.dim, dtype=pool.dtype) for _ in range(2))
            cases.append(
                Case(
                    f"gather {share:.0%} (dense), {layout}",
                    moved,
                    lines,
                    lambda a=(pool, page, slot, out), mover=mover: mover.gather(*a),
                    lambda a=(pool, page, slot), mover=mover: [
                        mover._gather(a[0], name, *a[1:]) for name in ("keys", "values")
                    ],
                )
            )
    return cases


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--isa", choices=native.ISAS, help="default: the best there is")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=32, help="slots of a page")
    parser.add_argument("--layouts", nargs="+", default=["keys_transposed", "slot_major"])
    parser.add_argument("--mebibytes", type=int, default=64, help="of tokens in each operation")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to a file, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
