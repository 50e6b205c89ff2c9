# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The figures as tables: for the terminal, and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltamem_vllm.evaluation.codec.results import Measured, Row

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """Cells of text under a title, with a line that says how to read them."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str


def tables(found: Measured) -> list[Table]:
    """For each page size what every scheme loses, and what cold pages as they are written do to attention."""
    made = []
    for page_tokens in dict.fromkeys(row.page_tokens for row in found.rows):
        rows = [row for row in found.rows if row.page_tokens == page_tokens]
        made.append(_schemes(page_tokens, rows, found))
        written = [row for row in rows if row.written]
        if written:
            made.append(_written(page_tokens, written))
    return made


def _schemes(page_tokens: int, rows: list[Row], found: Measured) -> Table:
    head = ["reference", "scales: keys", "values", "bits", "tokens a page", "bits: key", "value", "both"]
    head += ["error: key", "value", "loss", "KL", "KL, sinks coded"]
    cells = [
        [
            row.reference + (" *" if row.written else ""),
            row.keys,
            row.values,
            str(row.bits),
            str(row.capacity),
            *(f"{bits:.2f}" for bits in (row.key_bits, row.value_bits, row.element_bits)),
            *(f"{error:.3f}" for error in (row.key_error, row.value_error, row.loss)),
            *(_small(kl) for kl in (row.kl, row.kl_coded_sinks)),
        ]
        for row in rows
    ]
    note = (
        "*: as cold pages are written. bits: of an element, everything in the page counted; error: mean |x - x'| / "
        "|x|; loss: mean |o - o'| / |o| of attention's output; KL: of the continuation, nats a token. "
        f"Controls: not coded {_small(found.controls.exact)}, drawn codes {_small(found.controls.random)}"
    )
    return Table(f"Pages of {page_tokens} uncoded tokens", head, cells, note)


def _written(page_tokens: int, rows: list[Row]) -> Table:
    head = [
        "bits",
        "bits an element",
        "bytes of uncoded",
        "error: value",
        "loss",
        "of keys alone",
        "of values alone",
        "KL",
    ]
    cells = [
        [
            str(row.bits),
            f"{row.element_bits:.2f}",
            f"{row.element_bits / 16:.0%}",
            *(f"{figure:.4f}" for figure in (row.value_error, row.loss, row.loss_keys, row.loss_values)),
            _small(row.kl),
        ]
        for row in rows
    ]
    note = "loss: what a share of attention's output an entry costs by being cold; 1 would be the output itself"
    return Table(f"Cold pages as they are written, {page_tokens} uncoded tokens", head, cells, note)


def cost(found: Measured) -> str:
    """What the reference "layer" would cost whoever reads, in a sentence."""
    one, other = found.map_multiplications, found.attention_multiplications
    return (
        f"the map to a layer takes {one:,} multiply-adds a token, attention of one query {other:,}: "
        f"{one / other:.0f} times as many"
    )


def print_report(found: Measured, console: Console) -> None:
    """Print the tables."""
    from rich.table import Table as Printed

    for table in tables(found):
        printed = Printed(*table.head, title=table.title, caption=table.note, box=None)
        for cells in table.rows:
            printed.add_row(*cells)
        console.print(printed, "")
    if any(row.reference == "layer" for row in found.rows):
        console.print(cost(found))


def markdown(found: Measured, command: str) -> str:
    """The tables as Markdown, with what they come from."""
    machine, code = found.details["machine"], found.details["code"]
    versions = ", ".join(f"{name} {number}" for name, number in code["versions"].items())
    chosen = ", ".join(f"{name} {_plain(value)}" for name, value in found.settings.items())
    lines = [
        f"# Codecs of cold tokens: {found.model}",
        "",
        (
            f"`{command}`: {chosen}. {found.details['dtype']} on {found.details['threads']} thread(s), "
            f"{found.details['duration_s']:.0f} s, {machine['cpu']}, {machine['cores']} cores; {versions}; commit "
            f"{code['commit']}."
        ),
        "",
    ]
    for table in tables(found):
        lines += [f"## {table.title}", "", _line(table.head), _line(["---"] * len(table.head))]
        lines += [*map(_line, table.rows), "", f"{table.note}.".replace("*:", "\\*:"), ""]
    if any(row.reference == "layer" for row in found.rows):
        lines += [f"Cost of the reference `layer`: {cost(found)}.", ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in cells)} |"


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _small(number: float) -> str:
    if number == 0:
        return "0"
    return f"{number:.4f}" if abs(number) >= 1e-4 else f"{number:.1e}"
