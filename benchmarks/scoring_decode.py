# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What knowing the tokens' worth costs while a batch decodes: the share of all steps' time.

A batch of requests is prefilled and compacted, then decodes in the real engine, which compacts it again each time it
has grown by the policy's interval. Timed are the steps and, within them, remembering the newest queries (every step,
every layer), rating tokens, and whole compactions, which include the rating. The clock around each part costs about a
tenth of a microsecond. A clock inside a step is not touched by what else the machine does from one step to the next.

    .venv/bin/python benchmarks/scoring_decode.py [--scorers predictor-tova predictor] [--compiled] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from report import Report

# The engine runs in the child process itself, where its parts can be timed; several threads would fight over a core.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Spent:
    """Seconds of the timed steps: each one's, and of all of them those of each part."""

    steps: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("remembering", "rating", "compacting"), 0.0))
    compactions: int = 0

    def share(self, part: str) -> float:
        """Of the steps' time."""
        return self.parts[part] / sum(self.steps)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, with its time added to a part."""

        def timing(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.parts[part] += time.perf_counter() - began

        return timing


def measure(args: argparse.Namespace, scorer: str) -> dict[str, Any]:
    """Decode with one scorer; the fields of its `Spent`."""
    os.environ.update(_ENVIRONMENT)
    import torch
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from deltamem_vllm.dealing.rater import Rater
    from deltamem_vllm.integration import backends
    from deltamem_vllm.integration.compactor import Compactor
    from deltamem_vllm.models.catalog import resolve_model
    from deltamem_vllm.scoring.window import ObservationWindow

    length = args.tokens + args.steps + 2 * args.requests
    length += -length % 32
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=resolve_model(args.model),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=length,
            max_num_seqs=args.requests,
            num_gpu_blocks_override=2 * args.requests * length // 32,
            gpu_memory_utilization=0.2,
            enforce_eager=not args.compiled,
            enable_prefix_caching=False,
            disable_log_stats=True,
            additional_config={"deltamem": {"mode": "always", "keep_ratio": args.keep, "scorer": scorer}},
        )
    )
    generator = torch.Generator().manual_seed(args.seed)
    # No request ends while the steps are timed.
    params = SamplingParams(max_tokens=length - args.tokens, ignore_eos=True, detokenize=False, temperature=0.0)
    for number in range(args.requests):
        prompt = torch.randint(500, 40_000, (args.tokens,), generator=generator).tolist()
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    written = dict.fromkeys(map(str, range(args.requests)), 0)
    while min(written.values()) < 2:  # the second token comes after the compaction of the prompt
        for output in engine.step():
            written[output.request_id] = len(output.outputs[0].token_ids)

    spent = Spent()
    with (
        mock.patch.object(backends, "record", spent.timed("remembering", backends.record)),
        mock.patch.object(ObservationWindow, "begin_step", spent.timed("remembering", ObservationWindow.begin_step)),
        mock.patch.object(Rater, "rate", spent.timed("rating", Rater.rate)),
        mock.patch.object(Compactor, "run", spent.timed("compacting", Compactor.run)),
    ):
        compactions = spent.parts["compacting"]
        for _ in range(args.steps):
            began = time.perf_counter()
            outputs = engine.step()
            spent.steps.append(time.perf_counter() - began)
            if len(outputs) != args.requests:
                raise RuntimeError(f"expected a token of each of {args.requests} requests, got {len(outputs)}")
            if spent.parts["compacting"] > compactions:
                spent.compactions, compactions = spent.compactions + 1, spent.parts["compacting"]
    return asdict(spent)


def main() -> None:
    args = parse()
    out = Report("Rating tokens while decoding", (__doc__ or "").split("\n\n")[1], args.markdown)
    out.add(
        f"{args.requests} requests of {args.tokens} random tokens, of which {args.keep:.0%} is kept, {args.steps} "
        f"steps, {'compiled' if args.compiled else 'eager'}, one thread.\n\n"
        "| scorer | median step, ms | steps with compactions | remembering | rating | both | compactions and rating |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for scorer in args.scorers:
        # A process for each: an engine that ends leaves its memory behind.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
            spent = Spent(**child.submit(measure, args, scorer).result())
        both = spent.share("remembering") + spent.share("rating")
        out.add(
            f"| {scorer} | {statistics.median(spent.steps) * 1e3:.1f} | {spent.compactions} of {len(spent.steps)} | "
            f"{spent.share('remembering'):.2%} | {spent.share('rating'):.2%} | {both:.2%} | "
            f"{spent.share('compacting'):.2%} |"
        )
    out.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2", help="an embedded model's name, a Hugging Face id or a local path"
    )
    parser.add_argument("--scorers", nargs="+", default=["predictor-tova", "predictor", "tova", "streaming"])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="of each prompt")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the full cache that is kept")
    parser.add_argument("--steps", type=int, default=300, help="that are timed, each a token of every request")
    parser.add_argument("--compiled", action="store_true", help="with vLLM's compilation: shorter steps, a slow start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to a file, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
