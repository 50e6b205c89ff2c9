# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""One frame of `deltamem top`: as much of a view as fits the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from deltamem_vllm.watching.totals import Totals
from deltamem_vllm.watching.view import View
from deltamem_vllm.watching.words import (
    UNKNOWN,
    bytes_text,
    count_text,
    duration_text,
    printable,
    rate_text,
    share_text,
)

HOT, COLD, OTHER, FREE = "dark_orange", "dodger_blue1", "grey50", "grey30"
_EVENT_STYLE = {"refused": "red", "skipped": "yellow", "preempted": "magenta", "compacted": "green"}
_FEWEST_ROWS, _MOST_EVENTS = 3, 6
# Terminals with fewer lines than this have none to spare.
_LOW = 20
# Column, least width of the terminal that has room for it.
_COLUMNS = (
    ("request", 0),
    ("status", 50),
    ("kept", 0),
    ("tokens", 60),
    ("resident", 40),
    ("hot", 74),
    ("cold", 86),
    ("cut", 66),
    ("age", 56),
)


class Frame:
    """A rich renderable; looks at the size of the terminal each time it is drawn.

    Parameters
    ----------
    view : View
        What to show.
    whole : bool
        Show every request and event, whatever the height: the output goes to a file or scrolls.
    """

    def __init__(self, view: View, *, whole: bool = False) -> None:
        self._view = view
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        view, width, height = self._view, options.max_width, options.height or console.height
        # Blank lines are the first to go.
        gap = [Text()] if self._whole or height >= _LOW else []
        head = [_title(view), *_problem(view), *gap, *_pool(view.totals, width), *gap, *_facts(view, width), *gap]
        yield from head
        left = max(0, height - len(head))
        events = _events(view)
        rows = view.rows()
        if self._whole:
            shown_rows, shown_events = len(rows), len(events)
        else:
            # Events get what the table does not need, the table what they leave, but never all.
            shown_events = min(len(events), _MOST_EVENTS, max(0, left - _FEWEST_ROWS - 4))
            shown_rows = max(0, left - (shown_events + 2 if shown_events else 0) - 2)
        yield _table(rows[:shown_rows], width, engines=len(view.stats.get("engines", [])))
        if view.note is not None:
            yield Text(printable(view.note), style="yellow")
        elif not rows:
            yield Text("no live requests", style="dim")
        elif len(rows) > shown_rows:
            yield Text(f"… and {len(rows) - shown_rows} more", style="dim")
        if shown_events:
            yield Text()
            yield from events[:shown_events]


def _title(view: View) -> Text:
    stats = view.stats
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("deltamem top", style="bold").append("  ")
    text.append(printable(stats.get("model", UNKNOWN)), style="cyan").append(f" at {printable(view.name)}")
    engines = len(stats.get("engines", []))
    if engines != 1:
        text.append(f" · {engines} engines")
    text.append(f" · {printable(stats.get('version', UNKNOWN))}", style="dim")
    if "uptime_s" in stats:
        text.append(f" · up {duration_text(stats['uptime_s'])}", style="dim")
    text.append(f" · {time.strftime('%H:%M:%S', time.localtime(view.at))}", style="dim")
    return text


def _problem(view: View) -> Iterator[Text]:
    if view.problem is not None:
        age = duration_text(time.time() - view.at)
        yield Text(f"NO ANSWER, numbers are {age} old: {printable(view.problem)}", style="bold red")


def _pool(totals: Totals, width: int) -> Iterator[Text]:
    pool, used, hot, cold = totals.pool_bytes, totals.used_bytes, totals.hot_bytes, totals.cold_bytes
    if pool is None or used is None or hot is None or cold is None:
        yield Text("pool: this server does not tell", style="yellow")
        return
    # Blocks that are shared count once in the pool and once for each request: hot + cold may exceed what is used.
    other, free = max(0.0, used - hot - cold), max(0.0, pool - max(used, hot + cold))
    room = max(10, width - 1)
    whole = max(pool, used, hot + cold) or 1
    bar, ends, filled = Text(no_wrap=True), 0.0, 0
    for part, style, sign in ((hot, HOT, "█"), (cold, COLD, "▓"), (other, OTHER, "▒"), (free, FREE, "·")):
        ends += part
        cells = round(room * ends / whole) - filled
        filled += cells
        bar.append(sign * cells, style=style)
    yield bar
    legend = Text(no_wrap=True, overflow="ellipsis")
    legend.append(f"pool {share_text(used, pool)} of {bytes_text(pool)}", style="bold")
    for name, part, style, sign in (
        ("hot", hot, HOT, "█"),
        ("cold", cold, COLD, "▓"),
        ("other", other, OTHER, "▒"),
        ("free", free, FREE, "·"),
    ):
        legend.append(f"  {sign} ", style=style).append(f"{name} {bytes_text(part)}")
    yield legend


def _facts(view: View, width: int) -> Iterator[Text]:
    totals, grown = view.totals, view.rates
    held = None if totals.hot_bytes is None or totals.cold_bytes is None else totals.hot_bytes + totals.cold_bytes
    factor = f" ({totals.logical_bytes / held:.1f}x)" if totals.logical_bytes and held else ""
    yield _line(
        width,
        ("tokens", f"{count_text(totals.logical_tokens)} seen"),
        ("resident", f"{count_text(totals.resident_tokens)} ({_resident_share(totals)})"),
        ("saved", f"{bytes_text(totals.saved_bytes)}{factor}"),
    )
    yield _line(
        width,
        ("running", count_text(totals.running)),
        ("waiting", count_text(totals.waiting)),
        ("compacted", count_text(totals.compacted)),
        ("preempted", count_text(totals.counters.get("preempted_compacted_requests"))),
        ("refused", count_text(_labelled(totals, "requests_refused"))),
        ("skipped", count_text(_labelled(totals, "compactions_skipped"))),
    )

    if not grown:
        return  # a first look has no rates

    def rate(name: str) -> str:
        return f"{rate_text(grown.get(name))}/s"

    busy = grown.get("compaction_seconds")
    # Of an engine's time: with several engines, the mean.
    share = None if busy is None else (busy + grown.get("policy_seconds", 0.0)) / max(1, len(view.stats["engines"]))
    yield _line(
        width,
        ("compactions", rate("compactions")),
        ("evicted", rate("evicted_tokens")),
        ("freed blocks", rate("freed_blocks")),
        ("overhead", UNKNOWN if share is None else f"{100 * share:.1f}%"),
    )


def _resident_share(totals: Totals) -> str:
    return share_text(totals.resident_tokens, totals.logical_tokens)


def _labelled(totals: Totals, name: str) -> float | None:
    found = [value for key, value in totals.counters.items() if key.startswith(name + "{")]
    return sum(found) if found else None


def _line(width: int, *facts: tuple[str, str]) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, value in facts:
        text.append("" if not text else "   " if width >= 80 else "  ")
        text.append(f"{name} ", style="dim").append(value)
    return text


def _table(rows: list[tuple[int, Mapping[str, Any]]], width: int, engines: int) -> Table:
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim bold", show_edge=False)
    columns = [name for name, least in _COLUMNS if width >= least]
    if engines > 1 and width >= 64:
        columns.insert(1, "engine")
    for name in columns:
        left = name in ("request", "status", "kept")
        table.add_column(
            name,
            justify="left" if left else "right",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if name == "request" else None,
        )
    bar = 10 if width >= 80 else 5
    for engine, row in rows:
        cells = {
            "request": Text(printable(row.get("id", UNKNOWN))),
            "engine": Text(str(engine)),
            "status": Text(
                printable(row.get("status", UNKNOWN)), style="" if row.get("status") == "running" else "dim"
            ),
            # All of nothing is no share worth showing.
            "kept": _kept(row.get("kept_share") if row.get("logical_tokens") else None, bar),
            "tokens": Text(count_text(row.get("logical_tokens"))),
            "resident": Text(count_text(row.get("resident_tokens"))),
            "hot": Text(bytes_text(row.get("hot_bytes")), style=HOT),
            "cold": Text(bytes_text(row.get("cold_bytes")), style=COLD),
            "cut": Text(count_text(row.get("compactions"))),
            "age": Text(duration_text(row.get("age_s"))),
        }
        table.add_row(*(cells[name] for name in columns))
    return table


def _kept(share: float | None, cells: int) -> Text:
    if share is None:
        return Text(UNKNOWN)
    full = round(cells * min(1.0, max(0.0, share)))
    return (
        Text("█" * full, style=HOT).append("·" * (cells - full), style=FREE).append(f" {100 * share:3.0f}%", style="")
    )


def _events(view: View) -> list[Text]:
    found = []
    for event in view.stats.get("recent", []):
        kind = printable(event.get("kind", UNKNOWN))
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(time.strftime("%H:%M:%S ", time.localtime(event.get("at", 0))), style="dim")
        text.append(f"{kind:9} ", style=_EVENT_STYLE.get(kind, ""))
        text.append(printable(event.get("reason", "")))
        for name in ("request", "detail"):
            if event.get(name):
                text.append(f"  {printable(event[name])}", style="dim")
        found.append(text)
    return found
