# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The report of `deltamem eval`: results first, then how to read them, then what they were measured on."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from deltamem_vllm.evaluation.eval import markdown, report_tables
from deltamem_vllm.evaluation.eval.shortcomings import shortcomings
from deltamem_vllm.evaluation.eval.tables import CONDITIONS, FAILS_BELOW, EvalTable
from deltamem_vllm.evaluation.results import Results

# Stands right below the first table.
_FIRST_PLOT = "retention"
_HOW_TO_READ = """\
- **Teacher-forced.** The right answer is given to the model token by token. A question is solved if every token of
  every value is the most probable one at its place: greedy decoding would write exactly this answer.
- **Retention** counts only questions that the full cache solves, of whatever task, so the full cache has 1. In
  brackets: 95% Wilson interval. The full cache *fails* a task at a length and setting if it solves less than half of
  what it was asked; such a task is in no pooled figure but retention.
- **Log-prob drop** is what an answer token loses against the full cache, in nats, mean over all questions of the
  pooled tasks, with a 95% bootstrap interval over questions. It tells policies apart with fewer samples than right
  and wrong do, because near misses count. Below zero: better than the full cache.
- **Fidelity** compares whole distributions: mean KL(full || policy) per token in nats, and the share of tokens at
  which both have the same most probable token. Continuation: the text's own next tokens. Generation: what the full
  cache wrote itself. A low KL does not mean that facts are kept; judge by both.
- **Marks.** Bold: the best at this budget, controls included. `=`: cannot be told from the best on the same samples
  (McNemar's exact test for retention, sign-flip test for log-probs, 5%, corrected for all pairs of policies).
  An unmarked figure is worse than the best at that level; the order among figures with `=` is not known.
- **Settings.** aware: the question stands in the prompt, so the policy has seen it before it evicts. agnostic: the
  cache is cut before the question arrives. two-turn: cut with one question known, then asked another about something
  else. text: no question at all.
- **Budget** is a share of the bytes that the full cache needs for the prompt, in whole blocks. What is decoded after
  it (a second question, the answer) is kept by all until the next compaction. fp8 is vLLM's own 8-bit cache, which
  keeps every token in half of the bytes. streaming and random are controls that read nothing of the text's meaning:
  what does not beat them at the same bytes has learned nothing about the tokens."""


def write_report(
    path: Path,
    results: Results,
    run: str,
    command: str,
    plots: Sequence[Path] = (),
    planned: Collection[str] | None = None,
) -> None:
    """Write the Markdown report of one run, finished or not.

    Parameters
    ----------
    path : Path
        The file to write; its folder is made.
    results : Results
        Rows.
    run : str
        Which run.
    command : str
        What was typed, for the reader who wants to repeat it.
    plots : sequence of Path
        PNG files of this run, shown in this order.
    planned : collection of str, optional
        Keys of all cells of the grid. Without them only gaps among samples that were begun can be counted.

    Raises
    ------
    NothingMeasured
        If the results have no such run.
    """
    links = [Path(os.path.relpath(plot, path.parent)) for plot in plots]
    text = render(EvalTable(results, run), run, command, links, planned)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def render(
    table: EvalTable,
    run: str,
    command: str,
    plots: Sequence[Path] = (),
    planned: Collection[str] | None = None,
) -> str:
    """The report as Markdown; `plots` are relative to it."""
    lines = [f"# What a smaller KV cache costs {table.conditions['model']}", "", f"Written by `{command}`.", ""]
    if not table.rows():
        lines += ["No cell of this run is measured yet.", "", *_measured_on(table, run)]
        return "\n".join(lines).rstrip() + "\n"
    lines += _measured(table)
    lines += _section("Shortcomings of this run", [f"- {line}" for line in shortcomings(table, planned)] + [""])
    if table.settings:
        lines += ["## Retention at equal bytes", ""]
        lines += ["Best policy at each budget, and after `=` those that cannot be told from it:", ""]
        lines += report_tables.at_a_glance(table)
        lines += _pictures(plot for plot in plots if plot.stem == _FIRST_PLOT)
        lines += [
            "Below, the share of the questions that the full cache solves which the policy solves as well. Bold: the"
        ]
        lines += ["best at this budget; `=`: cannot be told from the best on the same samples; n: questions.", ""]
        lines += report_tables.pooled(table, "retention")
        lines += _paired(table)
        lines += _section("Log-prob of the right answer lost, nats per token", report_tables.pooled(table, "drop"))
    lines += _section("Fidelity: KL to the full cache in nats, and agreement", report_tables.fidelity(table))
    lines += _section("More plots", _pictures(plot for plot in plots if plot.stem != _FIRST_PLOT or not table.settings))
    if table.settings:
        lines += _section(
            "What the full cache solves",
            ["Solved of asked, 95% Wilson interval.", "", *report_tables.full_scores(table)],
        )
    lines += [
        "## Bytes held",
        "",
        "Share of the full cache's bytes that a request held when its first measured token was computed: median and",
        "most over samples. Over: more than one block above the budget and the tokens decoded since the prompt; such",
        "cells are named under the shortcomings.",
        "",
        *markdown.details("By length, policy and budget", report_tables.residence(table)),
    ]
    lines += _section("Task by task", report_tables.by_task(table))
    lines += ["## How to read it", "", *_HOW_TO_READ.splitlines(), ""]
    lines += _measured_on(table, run)
    return "\n".join(lines).rstrip() + "\n"


def _paired(table: EvalTable) -> list[str]:
    pairs = report_tables.paired(table)
    if not pairs:
        return []
    return [
        "Two policies on the same questions: those that only the first solves, and those that only the second does.",
        "Bold: more than chance would do (McNemar's exact test, 5%, each pair for itself).",
        "",
        *pairs,
    ]


def _pictures(plots: Iterable[Path]) -> list[str]:
    return [line for plot in plots for line in (f"![{plot.stem}]({plot.as_posix()})", "")]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines] if any(lines) else []


def _measured(table: EvalTable) -> list[str]:
    rows = table.rows()
    questions = {(row["length"], row["task"], row["index"]) for row in rows if row["kind"] == "question"}
    texts = {(row["length"], row["task"], row["index"]) for row in rows if row["kind"] != "question"}
    tasks = len({row["task"] for row in rows if row["kind"] == "question"})
    lengths = ", ".join(map(str, table.lengths))
    policies = ", ".join(table.policies)
    budgets = ", ".join(map(markdown.percent, table.budgets))
    about = []
    if questions:
        asked = f"{markdown.plural(len(questions), 'long prompt')} of {markdown.plural(tasks, 'task')}"
        about.append(f"{asked} (settings: {', '.join(table.settings)})")
    if texts:
        about.append(f"{markdown.plural(len(texts), 'text')} without a question")
    text = (
        f"Samples: {' and '.join(about)}, at context lengths of {lengths} tokens. Each was run through vLLM with "
        f"the full KV cache and again with the same tokens under every policy ({policies}), held to "
        f"{budgets or 'no smaller budget'} of the full cache's bytes. Compared are the answers and the "
        "distributions of the next token. Retention is pooled over all that the full cache solves, log-probs over "
        f"tasks of which it solves at least {markdown.percent(FAILS_BELOW)}. Results so far: "
        f"{markdown.plural(len(rows), 'cell')}."
    )
    return [*textwrap.wrap(text, 110), ""]


def _seconds(table: EvalTable) -> float:
    return float(sum(row["seconds"] for row in table.rows()))


def _measured_on(table: EvalTable, run: str) -> list[str]:
    found = table.conditions
    machine, code, geometry = found["machine"], found["code"], found["geometry"]
    versions = ", ".join(f"{name} {version}" for name, version in code["versions"].items())
    hardware = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}"
    settings = ", ".join(f"{name}={value}" for name, value in machine["environment"].items())
    rows = table.rows()
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows}))) or "none yet"
    lines = [
        "## Measured on",
        "",
        f"- run {run} (`{CONDITIONS}` and all rows in the JSON lines), model {found['model']}, seed {seeds}",
        f"- {', '.join(f'{name}={value}' for name, value in geometry.items())}",
        f"- {hardware}; {settings or 'no thread settings in the environment'}",
        f"- {versions}; commit {code['commit'] or 'unknown'}, sources {code['source_sha256']}",
    ]
    if rows:
        seconds = _seconds(table)
        mean = seconds / len(rows)
        cells = markdown.plural(len(rows), "cell")
        lines.append(f"- {cells}, {mean:.1f} s each, {markdown.duration(seconds)} in all; cells run side by side")
    lines.append("")
    return lines + markdown.details("The grid", ["```json", json.dumps(found["grid"], indent=1), "```", ""])
