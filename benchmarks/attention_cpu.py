# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Attention on CPU: ours over hot and cold pages, vLLM's own kernel on equal hot work, and what the memory gives.

    python benchmarks/attention_cpu.py [--threads 1 2] [--rounds 7] [--dim 64] [--group 3] [--markdown FILE]

Every round times each side once, in turn; shown are medians. A side reads several copies of its pages in turn, more
than the caches hold, as the layers of a model do, in huge pages, as in a server. GB/s are of what must be read once:
hot tokens, or whole cold pages.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pools import as_in_a_server
from report import Report

from deltamem_vllm.ops import native
from deltamem_vllm.ops.inputs_attention import AttentionCase, make_attention
from deltamem_vllm.ops.paged_attention import paged_attention

MIB_PER_SIDE = 160  # several times a cache of the last level


def main() -> None:
    args = parse()
    out = Report("Attention on a CPU", (__doc__ or "").strip().split("\n\n")[-1], args.markdown)
    out.add(
        f"\nHeads of {args.dim} dims, {args.group} query heads for each kv head, blocks of {args.block} tokens, "
        f"bfloat16, keys transposed, {args.isa or native.isa()}, medians of {args.rounds} rounds."
    )
    for threads in args.threads:
        torch.set_num_threads(threads)
        for title, cases in scenes(args).items():
            report(title, cases, threads, args, out)
    out.close()


def scenes(args: argparse.Namespace) -> dict[str, dict[str, AttentionCase]]:
    """Sides of every comparison; the first is hot, and is what vLLM's kernel gets too."""
    many, one, context = args.sequences * args.heads, args.heads, args.context

    def make(count: int, queries: int, hot: int, bits: int = 0, pages: int = 0) -> AttentionCase:
        return make_attention(
            "keys_transposed", torch.bfloat16, args.dim, args.block, args.group, [queries] * count, [hot] * count, bits,
            [pages] * count, full=True,
        )  # fmt: skip

    pages = context // args.block
    decode = {"hot": make(many, 1, context)}
    for bits in (8, 4, 2):
        case = make(1, 1, args.block, bits, 1)
        assert case.cold_format is not None
        equal = -(-context // case.cold_format.capacity)
        decode[f"{bits} bits, equal tokens"] = make(many, 1, args.block, bits, equal)
        if bits < 8:
            decode[f"{bits} bits, equal bytes"] = make(many, 1, args.block, bits, pages)
    return {
        f"decode, {args.sequences} x {args.heads} heads x {context} tokens": decode,
        f"decode, 1 x {args.heads} heads x {4 * context} tokens": {"hot": make(one, 1, 4 * context)},
        f"decode, 1 head x {4 * context} tokens": {"hot": make(1, 1, 4 * context)},
        f"prefill, {args.heads} heads, 512 tokens on top of 2048": {"hot": make(one, 512, 2560)},
    }


def report(title: str, cases: dict[str, AttentionCase], threads: int, args: argparse.Namespace, out: Report) -> None:
    sides: dict[str, tuple[Callable[[], None], int]] = {}
    for name, case in cases.items():
        copies = [
            case.with_pool(as_in_a_server(case.pool))
            for _ in range(1 if args.small else 1 + min(15, MIB_PER_SIDE * 2**20 // case.bytes_read))
        ]
        total = case.bytes_read * len(copies)
        if name == "hot":
            sides["vLLM's kernel"] = vllm_side(copies), total
        sides[f"ours, {name}"] = our_side(copies, args.isa), total
    much = as_in_a_server(torch.zeros(MIB_PER_SIDE * 2**18))
    sides["only reading"] = lambda: void(much.sum()), much.nbytes
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, (step, _) in sides.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    speed = {name: sides[name][1] / median[name] / 1e9 for name in sides}
    stock = median["vLLM's kernel"] / sides["vLLM's kernel"][1] * cases["hot"].bytes_read
    out.add(f"\n## {title[0].upper()}{title[1:]}, {threads} thread(s)\n")
    out.add("| side | GB/s | of reading | ms a call | vLLM's time / this |\n| --- | ---: | ---: | ---: | ---: |")
    for name in sides:
        share = f"{speed[name] / speed['only reading']:.0%}"
        if name == "only reading":
            out.add(f"| {name} | {speed[name]:.1f} | {share} | | |")
            continue
        size = cases[name.removeprefix("ours, ")].bytes_read if name.startswith("ours") else cases["hot"].bytes_read
        call = median[name] / sides[name][1] * size
        out.add(f"| {name} | {speed[name]:.1f} | {share} | {call * 1e3:.2f} | {stock / call:.2f} |")


def our_side(cases: list[AttentionCase], isa: str | None) -> Callable[[], None]:
    output = torch.empty_like(cases[0].query)

    def run() -> None:
        for case in cases:
            paged_attention(
                case.query, case.pool, case.hot, case.block_table, case.seq_lens, case.query_start_loc, case.scale,
                output, **case.cold, isa=isa,
            )  # fmt: skip

    return run


def vllm_side(cases: list[AttentionCase]) -> Callable[[], None]:
    """vLLM's kernel on hot pages, told that every sequence has one kv head, as in integration/dealt_read.py."""
    from vllm import _custom_ops as ops

    output = torch.empty_like(cases[0].query)
    group, dim = cases[0].query.shape[1:]
    isa = "vec" if dim % 32 == 0 and cases[0].hot.block_size % 32 == 0 else "vec16"

    def run() -> None:
        for case in cases:
            split = ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(case.seq_lens), num_heads=group, num_kv_heads=1, head_dim=dim, seq_lens=case.seq_lens,
                dtype=case.query.dtype, query_start_loc=case.query_start_loc, causal=True, sliding_window_size=-1,
                isa=isa, enable_kv_split=True,
            )  # fmt: skip
            pages = case.pool.view(len(case.pool), 1, 2 * case.hot.block_size, dim)
            keys, values = pages.chunk(2, dim=2)
            ops.cpu_attention_with_kv_cache(
                query=case.query, key_cache=keys, value_cache=values, output=output,
                query_start_loc=case.query_start_loc, seq_lens=case.seq_lens, scale=case.scale, causal=True,
                alibi_slopes=None, sliding_window=-1, block_table=case.block_table, softcap=0.0,
                scheduler_metadata=split, s_aux=None,
            )  # fmt: skip

    run()
    ours = torch.empty_like(output)
    case = cases[-1]
    paged_attention(
        case.query, case.pool, case.hot, case.block_table, case.seq_lens, case.query_start_loc, case.scale, ours
    )
    # A comparison of speed means something only if both compute the same.
    torch.testing.assert_close(output, ours, atol=2e-2, rtol=2e-2)
    return run


def void(_: object) -> None:
    return None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--heads", type=int, default=3, help="kv heads")
    parser.add_argument("--context", type=int, default=6144)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--group", type=int, default=3, help="query heads of a kv head")
    parser.add_argument("--block", type=int, default=32, help="tokens of a hot page")
    parser.add_argument("--isa", help="use no more than scalar, avx2, avx512 or avx512bf16")
    parser.add_argument("--small", action="store_true", help="one copy of each side: what the caches give")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to a file, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
