# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Numbers and foreign text as people read them in a terminal."""

from __future__ import annotations

UNKNOWN = "–"


def bytes_text(value: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least one in front: `1.5 GiB`."""
    if value is None:
        return UNKNOWN
    sign, value = ("-", -value) if value < 0 else ("", value)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{sign}{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{sign}{value:.1f} {unit}"


def count_text(value: float | None) -> str:
    """A count with its thousands apart: `12,345`."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def share_text(part: float | None, whole: float | None) -> str:
    """A share in per cent; nothing of nothing is unknown."""
    if part is None or not whole:
        return UNKNOWN
    return f"{100 * part / whole:.0f}%"


def rate_text(value: float | None) -> str:
    """A rate without its unit: two figures below ten, none behind the point from there on."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}" if value >= 0.1 else f"{value:.2f}"


def duration_text(seconds: float | None) -> str:
    """Two units of time at most: `45s`, `3m 20s`, `5h 2m`, `3d 4h`."""
    if seconds is None:
        return UNKNOWN
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes, seconds_left = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}m {seconds_left}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {minutes}m"
    return f"{hours // 24}d {hours % 24}h"


def printable(text: object) -> str:
    """Text from elsewhere without what a terminal would obey: escape sequences, line breaks, reversed text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))
