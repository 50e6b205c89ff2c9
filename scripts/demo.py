# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Serve the embedded model with deltamem and show what it saves (`make demo`).

Hides numbers in a prompt of 3.6 thousand tokens and asks a real `vllm serve --kv-cache-policy
deltamem` for one through the OpenAI client: once with the policy, once without. Ends with status 1 when the
answer read from the reduced cache is wrong or no memory was freed, 2 when the demo could not run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_vllm.evaluation.live_server import MODEL_NAME, LiveServer, ServerFailed, exit_on_sigterm, serve
from deltamem_vllm.evaluation.needle import Question, Task, make_question, message_counter
from deltamem_vllm.models.catalog import resolve_model
from deltamem_vllm.models.errors import ModelError

# One question of many: docs/results/cold.md says how many of them are answered with how much of the cache.
TASK: Task = "multikey"
INDEX, SEED, PROMPT_TOKENS = 5, 1, 3664
WARM_UP_TOKENS = 1000
BAR = 40


@dataclass(frozen=True)
class Answer:
    """One request: what was said, and the memory it held while it was said."""

    text: str
    prompt_tokens: int
    seconds: float
    levels: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit status."""
    args = parse(argv)
    began = time.monotonic()
    exit_on_sigterm()
    try:
        right = run(args)
    except (ServerFailed, ModelError) as error:
        print(f"\nThe demo could not run: {error}", file=sys.stderr)
        return 2
    print(f"\nTotal time: {time.monotonic() - began:.0f} s")
    return 0 if right else 1


def run(args: argparse.Namespace) -> bool:
    """Everything between the command line and the exit status."""
    step(f"Model: {args.model}")
    model = resolve_model(args.model)
    count = message_counter(model)
    question = make_question(TASK, INDEX, seed=SEED, length=PROMPT_TOKENS, count_tokens=count)
    warm_up = make_question(TASK, INDEX + 1, seed=SEED, length=WARM_UP_TOKENS, count_tokens=count)
    # One request in an empty pool: nothing would force an eviction.
    config = {"mode": "always", "keep_ratio": args.keep_ratio}
    if args.scorer:
        config["scorer"] = args.scorer
    step(f"Server: vllm serve {args.model} --kv-cache-policy deltamem --deltamem-config '{json.dumps(config)}'")
    print(f"   keeps {100 * args.keep_ratio:g}% of the memory of each prompt's tokens")
    with tempfile.TemporaryDirectory(prefix="deltamem-demo-") as folder:
        # Eager: starts sooner and needs no compiler. No prefix cache: it would spare the second answer its prompt.
        flags = ["--max-model-len", "4096", "--max-num-seqs", "4", "--dtype", "bfloat16"]
        flags += ["--enforce-eager", "--no-enable-prefix-caching"]
        with serve(
            model,
            Path(folder) / "server.log",
            deltamem=config,
            flags=flags,
            port=args.port,
            start_timeout_s=args.timeout,
            report=lambda line: print(f"   {line}", flush=True),
        ) as server:
            scorer = json.loads(server.get("/deltamem/config"))["config"]["scorer"]
            print(f"   ready at {server.url}; which tokens matter is said by the scorer {scorer}")
            ask(server, warm_up, {})  # a server's first request takes longer
            return show(server, question)


def show(server: LiveServer, question: Question) -> bool:
    """Ask with and without the policy; print both; whether all is as it should be."""
    step(f"Question: a prompt of {question.tokens} tokens with three numbers hidden in it; one is asked")
    print(f'   "{question.prompt.splitlines()[-1]}"')
    print(f"   right answer: {question.answer}, {question.depth:.0%} of the way in")
    before = server.metrics()
    kept = ask(server, question, {})
    after = server.metrics()
    counted = {name: round(after[name] - before[name]) for name in after if name.endswith("_total")}
    whole = ask(server, question, {"deltamem_policy": "off"})
    right = question.is_answered_by(kept.text)
    print_answer("with deltamem", kept, right)
    print_answer("same prompt, policy off", whole, question.is_answered_by(whole.text))

    evicted = counted["deltamem_evicted_tokens_total"]
    freed = counted["deltamem_freed_blocks_total"]
    pool = server.stats()["pool"]
    token_bytes = pool["block_bytes"] / pool["block_tokens"]
    step("KV memory this prompt holds while it is answered")
    resident = kept.prompt_tokens - evicted
    for name, tokens in (("without", whole.prompt_tokens), ("with", resident)):
        bar = "█" * max(round(BAR * tokens / whole.prompt_tokens), 1)
        print(f"   {name:8} {bar:{BAR}} {tokens:5} slots {tokens * token_bytes / 1e6:6.1f} MB")
    if kept.levels:
        exact = round(kept.levels["tier_bytes"]["hot"] / token_bytes)
        coded = kept.levels["cold_tokens"]
        print(f"   a layer and head holds {exact} tokens in full and {coded} in fewer bits, on average")
    print(f"   {freed} of {-(-kept.prompt_tokens // pool['block_tokens'])} blocks given back")
    print("   GET /deltamem/stats during the answer:")
    for name, answer in (("with", kept), ("without", whole)):
        print(f"     {name:8} {json.dumps(answer.levels) if answer.levels else 'the answer was faster'}")
    print("   GET /metrics, grown by:")
    for name in ("evicted_tokens", "freed_blocks", "compactions"):
        print(f"     deltamem_{name}_total {counted[f'deltamem_{name}_total']}")
    if not right:
        print("\nFAILED: the answer read from the reduced cache is wrong.")
    if freed <= 0:
        print("\nFAILED: no block was given back.")
    return right and freed > 0


def ask(server: LiveServer, question: Question, options: dict[str, Any]) -> Answer:
    """Ask through the OpenAI client, and read the live numbers once the answer has begun."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)
    text, prompt_tokens = "", 0
    levels: dict[str, Any] = {}
    began = time.monotonic()
    try:
        stream = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": question.prompt}],
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"vllm_xargs": options} if options else None,
        )
        for chunk in stream:
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            # The cache is compacted after the prompt, before the second token.
            if len(text.split()) > 2 and not levels:
                levels = live_levels(server)
    except OpenAIError as error:
        raise ServerFailed(f"the server did not answer ({error}); its log ends:\n{server.log_tail()}") from error
    return Answer(text.strip(), prompt_tokens, time.monotonic() - began, levels)


def live_levels(server: LiveServer) -> dict[str, Any]:
    """Levels of the running request; empty if there is none any more or the engine was too busy to say."""
    try:
        levels = server.stats()["totals"]["levels"]
    except urllib.error.HTTPError:
        return {}
    shown = ("resident_tokens", "logical_tokens", "resident_bytes", "logical_bytes", "tier_bytes", "cold_tokens")
    return {name: levels[name] for name in shown} if levels["logical_tokens"] else {}


def print_answer(name: str, answer: Answer, right: bool) -> None:
    """One answer and its verdict."""
    print(f"   {name} ({answer.seconds:.1f} s): {'RIGHT' if right else 'WRONG'}")
    print(f'     "{" ".join(answer.text.split())}"')


def step(title: str) -> None:
    """A heading."""
    print(f"\n-- {title}", flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="embedded model, Hugging Face id or path")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="share of the tokens that is kept")
    parser.add_argument("--scorer", help="see `deltamem scorers`; left out, the server takes its default")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--timeout", type=float, default=600, help="seconds the server may take to start")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
