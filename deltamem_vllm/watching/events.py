# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Server-sent events: the lines of a stream, as events, and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

# A state of 50 requests is some 20 kB; what is larger by far does not come from our routes.
MAX_EVENT_CHARS = 8_000_000


class StreamError(ValueError):
    """What arrives is no stream of our events."""


@dataclass(frozen=True)
class Event:
    """One event; `kind` is None for a comment, which only says that the connection lives."""

    kind: str | None
    data: str = ""


def encode_event(kind: str, data: Any) -> str:
    """The text of one event; `data` is written as JSON, which has no line break of its own."""
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


async def read_events(lines: AsyncIterator[str]) -> AsyncIterator[Event]:
    """Turn the lines of a text/event-stream into events.

    Raises
    ------
    StreamError
        An event is larger than any of ours.
    """
    kind, data, size = "message", list[str](), 0
    async for line in lines:
        if line.startswith(":"):
            yield Event(None)
            continue
        if not line:
            if data:
                yield Event(kind, "\n".join(data))
            kind, data, size = "message", [], 0
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        size += len(line)
        if size > MAX_EVENT_CHARS:
            raise StreamError(f"an event of more than {MAX_EVENT_CHARS} characters; this is no deltamem stream")
        if name == "event":
            kind = value
        elif name == "data":
            data.append(value)
