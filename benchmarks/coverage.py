# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How much of its prompt each kind of request keeps when coverage decides: content, not length.

    python benchmarks/coverage.py [--length 2048] [--coverage 0.8 0.9 0.95] [--samples 2] [--out FILE]

Prompts of one length, of every task of `deltamem eval`; prints a Markdown table of the share of blocks that is left
right after the prompt was compacted. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

# The engine runs in this process, so that the scheduler's plans can be read; several threads would fight over its core.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--coverage", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--keep-ratio", type=float, default=0.02, help="the least that is kept")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = to_table(measure(options), options)
    print(table)
    if options.out:
        options.out.write_text(table + "\n", encoding="utf-8")


def measure(options: argparse.Namespace) -> dict[str, dict[float, list[float]]]:
    """Kept shares by task and coverage."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from deltamem_vllm.evaluation.eval.encode import Encoder
    from deltamem_vllm.evaluation.tasks import TASKS, make_sample
    from deltamem_vllm.models.catalog import resolve_model

    model = resolve_model("smollm2")
    encoder = Encoder(AutoTokenizer.from_pretrained(model), chat=True)
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=options.length + 640,
            max_num_seqs=1,
            num_gpu_blocks_override=3 * (options.length + 640) // 32,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
            disable_log_stats=True,
            additional_config={"deltamem": {"mode": "always", "keep_ratio": options.keep_ratio, "min_tokens": 0}},
        )
    )
    core: Any = engine.engine_core
    scheduler = core.engine_core.scheduler
    plans: list[Any] = []
    schedule = scheduler.schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        plans.extend(output.deltamem.compactions)
        return output

    scheduler.schedule = watched
    kept: dict[str, dict[float, list[float]]] = {}
    for task, info in TASKS.items():
        for index in range(options.samples):
            sample = make_sample(task, index, seed=0, length=options.length, count_tokens=encoder.count)
            prompt = list(encoder.encode(sample, "aware" if info.kind == "question" else "text", most_forced=32).prompt)
            for coverage in options.coverage:
                plans.clear()
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=6,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"deltamem_coverage": coverage},
                )
                engine.add_request(f"{task}-{index}-{coverage}", {"prompt_token_ids": prompt}, params)
                while engine.has_unfinished_requests():
                    engine.step()
                share = len(plans[0].target_blocks) / len(plans[0].source_blocks) if plans else 1.0
                kept.setdefault(task, {}).setdefault(coverage, []).append(share)
    return kept


def to_table(kept: dict[str, dict[float, list[float]]], options: argparse.Namespace) -> str:
    """Markdown: a line for each task, least kept first, and the spread over all prompts."""
    lines = [
        "| prompt | " + " | ".join(f"coverage {c}" for c in options.coverage) + " |",
        "| --- |" + " --- |" * len(options.coverage),
    ]
    by_middle = sorted(
        kept, key=lambda task: statistics.fmean(kept[task][options.coverage[len(options.coverage) // 2]])
    )
    for task in by_middle:
        lines.append(f"| {task} | " + " | ".join(_percent(kept[task][c]) for c in options.coverage) + " |")
    everything = {c: [share for shares in kept.values() for share in shares[c]] for c in options.coverage}
    spread = (f"**{min(v):.0%} to {max(v):.0%}**, median {statistics.median(v):.0%}" for v in everything.values())
    return "\n".join([*lines, "| all prompts | " + " | ".join(spread) + " |"])


def _percent(shares: list[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)


if __name__ == "__main__":
    main()
