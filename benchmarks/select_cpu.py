# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What choosing tokens costs on a CPU: scoring and dealing, natively and in torch, alone and in whole compactions.

Both versions run on the same pool and take turns, so that a noisy machine is noisy for both; figures are medians. The
torch version is what the package does without the library's functions for scoring and dealing; tokens are moved and
coded natively on both sides. The defaults are SmolLM2-135M, whose prompt is compacted to a tenth.

    .venv/bin/python benchmarks/select_cpu.py [--threads 2] [--isa avx2] [--profile] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from pools import as_in_a_server
from report import Report

from deltamem_vllm.codec.cold_page import ColdFormat
from deltamem_vllm.dealing import deal
from deltamem_vllm.dealing.cold_tier import ColdTier
from deltamem_vllm.dealing.dealer import Dealer
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.prior import HeadPrior
from deltamem_vllm.dealing.rater import Rater
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.dealing.tiers import tier_path
from deltamem_vllm.memory.plans import CompactionPlan, Probe
from deltamem_vllm.ops import deal_pages, native
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.ops.inputs_utility import make_scores
from deltamem_vllm.scoring import paged
from deltamem_vllm.scoring.base import Scorer
from deltamem_vllm.scoring.features import feature_widths
from deltamem_vllm.scoring.registry import load_scorer
from deltamem_vllm.scoring.window import ObservationWindow

SINK, RECENT = 4, 8


@contextmanager
def in_torch() -> Iterator[None]:
    """Without the library's functions for scoring and dealing."""
    with mock.patch.object(paged, "_RATES", {}), mock.patch.object(deal_pages, "_library_for", lambda tensor: None):
        yield


@dataclass
class Request:
    """One request of `tokens` tokens in a pool of its own, and all that compacts it."""

    tokens: int
    dealer: Dealer
    rater: Rater
    tables: PageTables
    scorer: Scorer
    block: int
    keep: float
    cold: bool

    def plan(self, resident: int, first: int, target: int, serial: int) -> CompactionPlan:
        """To blocks from ``target`` on, out of those from ``first`` on."""
        source = tuple(range(first, first - (-resident // self.block)))
        kept = tuple(range(target, target + max(2, round(self.keep * self.tokens / self.block))))
        return CompactionPlan(
            "r", source, kept, kept, resident, len(kept) * self.block, self.tokens + 128, 0, 0, SINK, RECENT,
            self.scorer.name, "global", serial, in_place=False, cold=self.cold,
        )  # fmt: skip

    def forget(self) -> None:
        """As if it had never been compacted."""
        self.tables.requests.clear()

    def first(self) -> None:
        """The compaction of the prompt."""
        self.forget()
        self.dealer.run(self.plan(self.tokens, 0, -(-self.tokens // self.block), 1), self.scorer)

    def next(self) -> None:
        """The one after 128 more tokens; `first` must have been."""
        start = -(-self.tokens // self.block)
        kept = max(2, round(self.keep * self.tokens / self.block))
        resident = kept * self.block + 128
        self.dealer.run(self.plan(resident, start, start + kept + 8, 2), self.scorer)

    def probe(self) -> None:
        """What it would retain with fewer blocks."""
        self.forget()
        source = tuple(range(-(-self.tokens // self.block)))
        self.dealer.probe(
            Probe("r", source, self.tokens, self.tokens, SINK, RECENT, self.scorer.name, "global", self.cold),
            self.scorer,
        )

    def rate(self) -> None:
        """Scores only."""
        self.forget()
        pages, lengths = self.tables.source("r", range(-(-self.tokens // self.block)), self.tokens)
        self.rater.rate("r", pages, lengths, self.scorer)


def make_request(args: argparse.Namespace, tokens: int, name: str, bits: int) -> Request:
    """Keys of which some dims are large, queries of a window, and a prior as a calibration has it."""
    generator = torch.Generator().manual_seed(args.seed)
    blocks = -(-tokens // args.block)
    total = blocks + 2 * max(2, round(args.keep * blocks)) + 16
    shape = (args.layers, total, args.heads, args.block, 2 * args.dim)
    memory = as_in_a_server(torch.randn(shape, generator=generator, dtype=torch.float32).to(torch.bfloat16))
    pool = PagePool(list(memory))
    layout = make_layout(args.layout, args.block, args.dim)
    cold = ColdFormat(bits, args.dim, args.block * 2 * args.dim * 2) if bits else None
    tables = PageTables(pool, max_rows=1, max_width=total, fixed=False, cold=bits > 0)
    mover, scorer = DealtPages(layout), load_scorer(name)
    heads = [(args.heads * args.group, args.dim)] * args.layers
    window = ObservationWindow(args.window, 1, args.window, heads, torch.bfloat16, torch.device("cpu"))
    window.begin_step(["r"], [tokens - args.window], [args.window], args.window)
    for ring in window.rings:
        ring.copy_(torch.randn(ring.shape, generator=generator))
    if scorer.learned is not None:
        features = sum(feature_widths(args.dim, args.dim))
        scorer.bind(torch.randn(args.layers, args.heads, features, generator=generator) * 0.05)
    scales = [args.dim**-0.5] * args.layers
    rater = Rater(tables, mover, scales, window, 0.0, 0, cold)
    table = torch.rand(args.layers, args.heads, 128, generator=generator).sort(2, descending=True).values
    tier = None if cold is None else ColdTier(cold, 0.1, pool, layout)
    dealer = Dealer(tables, mover, rater, HeadPrior(table), tier)
    return Request(tokens, dealer, rater, tables, scorer, args.block, args.keep, bits > 0)


def op_cases(args: argparse.Namespace, tokens: int) -> dict[str, Callable[[], object]]:
    """The operations that deal, one by one."""
    lengths = torch.full((args.layers, args.heads), tokens)
    scores = make_scores("peaked", lengths, tokens, args.seed)
    ranked = deal.page_utilities(scores, lengths, args.block, SINK, RECENT)
    budget = max(2, round(args.keep * tokens / args.block))
    pages = deal.deal(ranked.utility, args.block, budget, 1)
    by_rank = scores.gather(2, ranked.order)
    free = ranked.utility[..., 1:]
    wanted = (budget - 1) * lengths.numel()
    return {
        "page_utilities (rank)": lambda: deal.page_utilities(scores, lengths, args.block, SINK, RECENT),
        "deal_pages": lambda: deal.deal_pages(free, wanted),
        "survivors": lambda: deal.survivors(ranked.order, pages, args.block),
        "page_mass": lambda: deal.page_mass(scores, lengths, ranked.order, args.block, SINK, RECENT),
        "tier_path": lambda: tier_path(by_rank, lengths, args.block, 3 * args.block, 0.1, 1),
    }


def main() -> None:
    args = parse()
    clock = time.process_time if args.cpu_time else time.perf_counter
    out = Report("Choosing tokens on a CPU", (__doc__ or "").split("\n\n")[1], args.markdown)
    for threads in args.threads:
        torch.set_num_threads(threads)
        with native.using_isa(args.isa or native.isa()):
            out.add(
                f"\n## {threads} thread(s), {native.isa()}\n\n{args.layers} layers, {args.heads} kv heads of "
                f"{args.dim} dims, {args.group} query heads each, a window of {args.window} queries, blocks of "
                f"{args.block} tokens, bfloat16, {args.layout}, {args.keep:.0%} kept, medians of {args.rounds} rounds"
                f"{', seconds of the processor (all threads)' if args.cpu_time else ''}.\n"
            )
            out.add(f"| {'what':44} | tokens | native ms | torch ms | times torch |")
            out.add("| :--- | ---: | ---: | ---: | ---: |")
            for tokens in args.tokens:
                for name, call in ({} if args.no_ops else op_cases(args, tokens)).items():
                    report(name, tokens, call, args.rounds, out, clock)
                for scorer in [] if args.no_ops else args.scorers:
                    request = make_request(args, tokens, scorer, 0)
                    report(f"scores, {scorer}", tokens, request.rate, args.rounds, out, clock)
                for scorer in args.scorers:
                    for bits in args.bits:
                        request = make_request(args, tokens, scorer, bits)
                        title = f"{scorer}{f', {bits} bits' if bits else ''}"
                        report(f"compaction of a prompt, {title}", tokens, request.first, args.rounds, out, clock)
                        report(
                            f"the next compaction, {title}",
                            tokens,
                            request.next,
                            args.rounds,
                            out,
                            clock,
                            request.first,
                        )
                        report(f"probe, {title}", tokens, request.probe, args.rounds, out, clock)
                        if args.profile:
                            profile(request)
    out.close()


def report(
    name: str,
    tokens: int,
    call: Callable[[], object],
    rounds: int,
    out: Report,
    clock: Callable[[], float],
    before: Callable[[], object] | None = None,
) -> None:
    """Time both versions in turn. ``before`` comes before each of them and is not timed."""
    seconds: dict[str, list[float]] = {"native": [], "torch": []}

    def once() -> float:
        if before is not None:
            before()
        began = clock()
        call()
        return clock() - began

    for turn in range(rounds + 1):
        found = {"native": once()}
        with in_torch():
            found["torch"] = once()
        if turn:  # the first touches fresh memory
            for version, taken in found.items():
                seconds[version].append(taken)
    ours, torchs = (statistics.median(seconds[version]) * 1e3 for version in ("native", "torch"))
    out.add(f"| {name:44} | {tokens:6} | {ours:9.2f} | {torchs:8.2f} | {torchs / ours:11.1f} |")


def profile(request: Request) -> None:
    """Where the time of a first compaction goes, by function, in either version."""
    for version in ("native", "torch"):
        profiler = cProfile.Profile(time.process_time)
        request.first()
        if version == "torch":
            with in_torch():
                profiler.runcall(request.first)
        else:
            profiler.runcall(request.first)
        print(f"\n{version}, {request.scorer.name}")
        pstats.Stats(profiler).sort_stats("tottime").print_stats(16)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--isa", choices=native.ISAS, help="default: the best there is")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--scorers", nargs="+", default=["predictor", "tova", "snapkv", "delta", "distinct"])
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 4], help="of cold pages; 0: there are none")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3, help="kv heads")
    parser.add_argument("--group", type=int, default=3, help="query heads of a kv head")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block", type=int, default=32, help="slots of a page")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--keep", type=float, default=0.1, help="share of the blocks that stays")
    parser.add_argument("--layout", default="keys_transposed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cpu-time", action="store_true", help="time that the processor spent, for a machine with other work"
    )
    parser.add_argument("--no-ops", action="store_true", help="whole compactions only")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, by function")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to a file, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
