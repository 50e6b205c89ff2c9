# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Time what a compaction with unequal pages costs beside scoring: rank, deal, choose, read and move.

The pool is random and full of other requests' pages; the defaults are SmolLM2-135M with 4,096 tokens of which a quarter
stays. Times are medians in milliseconds.

    .venv/bin/python benchmarks/dealing.py [--layout slot_major] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from deltamem_vllm.dealing.deal import curve, deal, page_utilities, survivors
from deltamem_vllm.dealing.prior import HeadPrior, combine
from deltamem_vllm.dealing.redundancy import discount_repeats
from deltamem_vllm.evaluation.machine import command_line, describe_machine
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.inputs import LAYOUTS, make_dealt_tokens
from deltamem_vllm.ops.layout import PageLayout


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    times = measure(args)
    print(
        f"{command_line()}\n{describe_machine()}\n{args.threads} thread(s), torch {torch.__version__}, {vars(args)}\n"
    )
    print(f"| {'what':34} | median ms | slowest ms |\n|{'-' * 36}|{'-' * 11}|{'-' * 12}|")
    for name, seconds in times.items():
        print(f"| {name:34} | {statistics.median(seconds) * 1e3:9.2f} | {max(seconds) * 1e3:10.2f} |")
    needed = ("page_utilities", "deal", "survivors", "where survivors stand", "gather", "scatter")
    total = sum(statistics.median(times[name]) for name in needed)
    print(f"\na compaction beside reading and scoring ({' + '.join(needed)}): {total * 1e3:.1f} ms")


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every run of every step."""
    pairs, device = args.layers * args.heads, torch.device(args.device)
    count = args.tokens // args.block
    case = make_dealt_tokens(args.layout, pairs, args.dim, args.block, count, 0, torch.bfloat16, args.seed)
    pool = case.pool.to(device)
    mover = DealtPages(PageLayout(case.layout.keys.to(device), case.layout.values.to(device)))
    # The generator's pairs are unequal; what is dealt here is a prompt, where all still hold the same.
    owned = torch.tensor([page for own in case.pages for page in own], device=device)
    source = owned.view(args.layers, args.heads, count)
    budget = max(1, round(args.keep * count))
    target = torch.tensor(case.spare, device=device)
    target = torch.cat([target, owned])[: budget * pairs]

    generator = torch.Generator().manual_seed(args.seed)
    sharp = torch.rand(args.layers, args.heads, 1, generator=generator) * 12
    scores = torch.rand(args.layers, args.heads, count * args.block, generator=generator).pow(sharp).to(device)
    lengths = torch.full((args.layers, args.heads), count * args.block, device=device)
    table = torch.rand(args.layers, args.heads, 128, generator=generator).sort(2, descending=True).values
    prior = HeadPrior(table.to(device))
    floor = -(-(args.sink + args.recent) // args.block)

    def stand(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        where = torch.nonzero_static(keep.flatten(), size=budget * pairs * args.block).squeeze(1)
        pair, token = where // keep.shape[2], where % keep.shape[2]
        return source.view(pairs, count)[pair, token // args.block], token % args.block

    ranked = page_utilities(scores, lengths, args.block, args.sink, args.recent)
    pages = deal(ranked.utility, args.block, budget, floor)
    keep = survivors(ranked.order, pages, args.block)
    page, slot = stand(keep)
    keys, values = mover.gather(pool, page, slot)
    layer_keys, layer_values = mover.read(pool, source[0], count * args.block)

    def read_all() -> None:
        for layer in source:
            mover.read(pool, layer, count * args.block)

    steps: dict[str, Callable[[], object]] = {
        "page_utilities": lambda: page_utilities(scores, lengths, args.block, args.sink, args.recent),
        "prior": lambda: prior.pages(args.tokens, args.block, count),
        "combine": lambda: combine(ranked.utility, ranked.utility),
        "deal": lambda: deal(ranked.utility, args.block, budget, floor),
        "survivors": lambda: survivors(ranked.order, pages, args.block),
        "curve": lambda: curve(ranked.utility, floor),
        "where survivors stand": lambda: stand(keep),
        "gather": lambda: mover.gather(pool, page, slot),
        "scatter": lambda: mover.scatter(pool, target, keys, values),
        "read, all layers": read_all,
        "discount_repeats, one layer": lambda: discount_repeats(scores[0], layer_keys, layer_values, 0.9),
    }
    return {name: timed(step, args.runs, device) for name, step in steps.items()}


def timed(step: Callable[[], object], runs: int, device: torch.device) -> list[float]:
    """Seconds of each run, after one that does not count."""
    seconds = []
    for _ in range(runs + 1):
        wait(device)
        began = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3, help="kv heads")
    parser.add_argument("--dim", type=int, default=64, help="elements of one key or value")
    parser.add_argument("--block", type=int, default=32, help="tokens of a page")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--keep", type=float, default=0.25, help="share of the blocks that stays")
    parser.add_argument("--sink", type=int, default=4)
    parser.add_argument("--recent", type=int, default=32)
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="keys_transposed", help="vLLM's CPU kernel: keys_transposed"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
