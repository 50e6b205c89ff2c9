# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What each scorer costs: needle and multi-key needle at 4k context, through a real server.

    python benchmarks/needle.py                    # asks, then writes docs/results/needle.md
    python benchmarks/needle.py --report-only      # writes the tables again

Every question is asked in two styles: `opened`, where the assistant's turn already has the first words of
the answer as in RULER, and `chat`, where the model writes them. It is first asked with the policy off; if
that is answered correctly, again for each scorer: opened with each keep ratio and observation window, as chat
with the larger ratio. Each row holds what `/metrics` counted for that one request, so a row without eviction
cannot pass for one with. Rows are appended to the `--rows` file as they come; the command goes on where it
was stopped.

One server serves all scorers through `switch_scorer`, because the prompt is then computed once and not once
for each. `--controls` questions of each task are asked again on servers started with
`--deltamem-config.scorer NAME` itself, and the report says whether the replies are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import needle_report
from needle_rows import WINDOW, Row, Rows, Variant
from openai import OpenAI

from deltamem_vllm.evaluation.live_server import MODEL_NAME, LiveServer, exit_on_sigterm, serve
from deltamem_vllm.evaluation.needle import TASKS, Question, Task, make_question, message_counter
from deltamem_vllm.models.catalog import resolve_model
from deltamem_vllm.scoring.registry import BUILTIN

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = 4096
BLOCK = 128
# Of the prompt's last block these many tokens are computed again after a prefix hit: more than any window, so
# that a cached prompt is scored with as many queries as a fresh one.
TAIL = 80
PROMPT_TOKENS = 28 * BLOCK + TAIL
RATIOS = (0.25, 0.1)
STYLES = ("opened", "chat")
OTHER_WINDOWS = {"delta": (8, 32), "snapkv": (8, 32)}
ANSWER_TOKENS = 32


VARIANTS = [
    *(Variant("opened", scorer, ratio) for scorer in BUILTIN for ratio in RATIOS),
    *(Variant("opened", scorer, RATIOS[0], window) for scorer, windows in OTHER_WINDOWS.items() for window in windows),
    # Twice as many tokens to write for each answer: one ratio.
    *(Variant("chat", scorer, RATIOS[0]) for scorer in BUILTIN),
]


@contextmanager
def needle_server(model: str, log: Path, scorer: str, window: int, choice: Path) -> Iterator[LiveServer]:
    """A server with one scorer; `switch` is made known to it as any other package's scorer would be."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        shutil.copy(Path(__file__).with_name("switch_scorer.py"), package)
        info = package / "deltamem_benchmarks-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deltamem-benchmarks\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[deltamem.scorers]\nswitch = switch_scorer:SwitchScorer\n")
        path = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        extra = {"PYTHONPATH": os.pathsep.join(path), "DELTAMEM_BENCH_SCORER_FILE": str(choice)}
        with (
            _environment(extra),
            serve(
                model,
                log,
                deltamem={"scorer": scorer, "window": window, "recent_tokens": 32},
                flags=[
                    *("--max-model-len", str(CONTEXT), "--dtype", "bfloat16", "--block-size", str(BLOCK)),
                    *("--max-num-seqs", "4", "--enforce-eager", "--enable-prompt-tokens-details"),
                ],
                report=say,
            ) as server,
        ):
            yield server


@contextmanager
def _environment(extra: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def ask(server: LiveServer, question: Question, variant: Variant) -> dict[str, Any]:
    """Send one request and measure it; the fields of a `Row` that come from the answer."""
    options: dict[str, Any] = {"deltamem_policy": "off"}
    if variant.scorer is not None:
        options = {"deltamem_keep_ratio": variant.keep_ratio}
    messages: list[Any] = [{"role": "user", "content": question.prompt}]
    body: dict[str, Any] = {"vllm_xargs": options}
    if variant.style == "opened":
        messages.append({"role": "assistant", "content": question.opening})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)
    before = server.metrics()
    began = time.monotonic()
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages,
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        stop=["."],
        extra_body=body,
    )
    seconds = time.monotonic() - began
    after = server.metrics()
    counted = {
        name: int(after[f"deltamem_{name}_total"] - before[f"deltamem_{name}_total"])
        for name in ("compactions", "evicted_tokens", "freed_blocks")
    }
    if (variant.scorer is not None) != (counted["evicted_tokens"] > 0):
        raise SystemExit(f"{variant} evicted {counted['evicted_tokens']} tokens; is something else using it?")
    assert answer.usage is not None
    details = answer.usage.prompt_tokens_details
    reply = answer.choices[0].message.content or ""
    return counted | {
        "reply": reply,
        "correct": question.is_answered_by(reply),
        "prompt_tokens": answer.usage.prompt_tokens,
        "cached_tokens": (details.cached_tokens if details else None) or 0,
        "reply_tokens": answer.usage.completion_tokens,
        "seconds": round(seconds, 2),
    }


class Run:
    """Asks what is still missing."""

    def __init__(self, args: argparse.Namespace, rows: Rows) -> None:
        self.args = args
        self.rows = rows
        self.model = resolve_model(args.model)
        self.count_tokens = message_counter(self.model)
        self.folder = Path(tempfile.mkdtemp(prefix="deltamem-needle-"))
        self.choice = self.folder / "choice.json"

    def question(self, task: Task, index: int) -> Question:
        """Question number `index`."""
        return make_question(
            task,
            index,
            seed=self.args.seed,
            length=PROMPT_TOKENS,
            count_tokens=self.count_tokens,
            keys=self.args.keys,
        )

    def main_server(self) -> None:
        """All scorers, ratios and windows on one server, until each task has `n` questions."""
        log = self.folder / "server.log"
        widest = max(variant.window for variant in VARIANTS)
        with needle_server(self.model, log, "switch", widest, self.choice) as server:
            for index in range(self.args.most):
                for task in TASKS:
                    known = self.known(task, "opened")
                    if len(known) < self.args.n or index in known:
                        self.ask_all(server, self.question(task, index))

    def known(self, task: Task, style: str) -> list[int]:
        """Questions that the full cache answers, the only ones that eviction can spoil."""
        return [
            row.index
            for row in self.rows.all()
            if (row.server, row.task, row.style, row.scorer) == ("switch", task, style, None)
            and row.seed == self.args.seed
            and row.correct
        ]

    def ask_all(self, server: LiveServer, question: Question) -> None:
        """One question in every variant; in a style that the full cache fails, nothing more."""
        styles = [style for style in STYLES if self.once("switch", server, question, Variant(style)).correct]
        for variant in VARIANTS:
            if variant.style in styles:
                self.once("switch", server, question, variant)

    def control_servers(self) -> None:
        """A few of the same questions on servers that were started with the scorer itself."""
        for scorer in self.args.control_scorers:
            questions = [
                self.question(task, i)
                for task in TASKS
                for i in sorted(self.known(task, "opened"))[: self.args.controls]
            ]
            wanted = [(q, Variant("opened", scorer, ratio)) for q in questions for ratio in RATIOS]
            if all(self.rows.find(scorer, q, variant) for q, variant in wanted):
                continue
            with needle_server(self.model, self.folder / f"{scorer}.log", scorer, WINDOW, self.choice) as server:
                for question, variant in wanted:
                    self.once(scorer, server, question, variant)

    def once(self, name: str, server: LiveServer, question: Question, variant: Variant) -> Row:
        """Make this request unless its row exists."""
        if row := self.rows.find(name, question, variant):
            return row
        self.choice.write_text(json.dumps({"scorer": variant.scorer, "window": variant.window}))
        row = Row(
            server=name,
            task=question.task,
            index=question.index,
            seed=question.seed,
            depth=round(question.depth, 3),
            answer=question.answer,
            **asdict(variant),
            **ask(server, question, variant),
        )
        self.rows.add(row)
        say(
            f"{name} {row.task} {row.index} {row.style} {row.scorer or 'full'} {row.keep_ratio} w{row.window}: "
            f"{'right' if row.correct else 'wrong'} in {row.seconds:.1f} s: {row.reply.strip()[-40:]!r}"
        )
        return row


def say(line: str) -> None:
    """Progress, for who watches."""
    print(line, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="embedded model, Hugging Face id or path")
    parser.add_argument("--n", type=int, default=10, help="questions per task that the full cache answers")
    parser.add_argument("--most", type=int, default=40, help="questions per task to try at most")
    parser.add_argument("--keys", type=int, default=3, help="needles in the multi-key task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--controls", type=int, default=1, help="questions per task on each control server")
    parser.add_argument("--control-scorers", nargs="*", default=list(BUILTIN), choices=list(BUILTIN))
    parser.add_argument("--rows", type=Path, default=ROOT / "docs/results/needle.jsonl")
    parser.add_argument("--report", type=Path, default=ROOT / "docs/results/needle.md")
    parser.add_argument("--report-only", action="store_true", help="ask nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Ask and report."""
    args = parse(argv)
    exit_on_sigterm()
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.rows)
    if not args.report_only:
        run = Run(args, rows)
        run.main_server()
        run.control_servers()
    args.report.write_text(needle_report.render([asdict(row) for row in rows.all()], args))
    say(f"wrote {args.report}")


if __name__ == "__main__":
    main()
