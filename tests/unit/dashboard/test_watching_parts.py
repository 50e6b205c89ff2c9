# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Addresses, events, totals and words of the watching side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from deltamem_vllm.watching import events
from deltamem_vllm.watching.address import Address, AddressError, parse_address, parse_addresses
from deltamem_vllm.watching.events import Event, StreamError, encode_event, read_events
from deltamem_vllm.watching.totals import Totals, rates
from deltamem_vllm.watching.words import UNKNOWN, bytes_text, duration_text, printable, rate_text, share_text


@pytest.mark.parametrize(
    ("text", "name", "url"),
    [
        ("http://gpu-1:8000", "gpu-1:8000", "http://gpu-1:8000"),
        ("http://gpu-1:8000/", "gpu-1:8000", "http://gpu-1:8000"),
        ("a=https://x/prefix/", "a", "https://x/prefix"),
        ("http://[::1]:8000/deltamem/dashboard", "[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_addresses_as_people_write_them(text: str, name: str, url: str) -> None:
    assert parse_address(text) == Address(name, url)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gpu-1:8000", "no address of a server"),
        ("ftp://gpu-1", "no address of a server"),
        ("file:///etc/passwd", "no address of a server"),
        ("http://gpu-1:port", "Port could not be cast"),
        ("http://me:secret@gpu-1", "give the key on its own"),
        ("http://gpu-1/?key=secret", "query or fragment"),
    ],
)
def test_an_address_that_cannot_be_watched_is_refused(text: str, why: str) -> None:
    with pytest.raises(AddressError, match=why) as refused:
        parse_address(text)
    assert "me:secret" not in str(refused.value)


def test_a_key_is_for_all_servers_or_there_is_one_for_each() -> None:
    urls = ["http://a", "http://b"]
    assert [one.key for one in parse_addresses(urls, [])] == [None, None]
    assert [one.key for one in parse_addresses(urls, ["k"])] == ["k", "k"]
    assert [one.key for one in parse_addresses(urls, ["k", "l"])] == ["k", "l"]
    with pytest.raises(AddressError, match="3 keys for 2 servers"):
        parse_addresses(urls, ["k", "l", "m"])
    with pytest.raises(AddressError, match="http://a is given twice"):
        parse_addresses(["one=http://a", "two=http://a"], [])
    with pytest.raises(AddressError, match="none was given"):
        parse_addresses([], [])


def test_a_key_is_not_in_the_text_of_an_address() -> None:
    assert "secret" not in repr(parse_address("http://a", "secret"))


async def _lines(text: str) -> AsyncIterator[str]:
    for line in text.split("\n"):
        yield line


def _read(text: str) -> list[Event]:
    async def collect() -> list[Event]:
        return [event async for event in read_events(_lines(text))]

    return asyncio.run(collect())


def test_events_are_read_as_they_are_written() -> None:
    text = encode_event("state", {"a": "line\nbreak"}) + ": alive\n\nevent: error\ndata: x\ndata: y\n\ndata: unfinished"
    assert _read(text) == [Event("state", '{"a":"line\\nbreak"}'), Event(None), Event("error", "x\ny")]


def test_an_event_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENT_CHARS", 100)
    with pytest.raises(StreamError, match="more than 100 characters"):
        _read("data: " + "x" * 60 + "\ndata: " + "x" * 60)


def _engine(used: int, hot: int, cold: int, compactions: int) -> dict[str, object]:
    levels = {
        "tier_bytes": {"hot": hot, "cold": cold},
        "logical_bytes": 1000,
        "logical_tokens": 50,
        "resident_tokens": 9,
    }
    counters = {"compactions": compactions, "compactions_skipped": {"shared_prefix": 1}}
    return {
        "totals": {"levels": levels, "counters": counters},
        "pool": {"blocks": 10, "free_blocks": 10 - used, "block_bytes": 100, "block_tokens": 4},
        "requests": {"running": 2, "waiting": 1, "compacted": 1},
    }


def test_totals_add_engines_up() -> None:
    totals = Totals.of({"engines": [_engine(4, 200, 100, 5), _engine(6, 100, 0, 7)], "refused": {"bad_option": 3}})
    assert (totals.pool_bytes, totals.used_bytes, totals.hot_bytes, totals.cold_bytes) == (2000, 1000, 300, 100)
    assert (totals.saved_bytes, totals.running, totals.waiting) == (1600, 4, 2)
    assert totals.counters == {
        "compactions": 12,
        "compactions_skipped{shared_prefix}": 2,
        "requests_refused{bad_option}": 3,
    }


def test_what_a_server_does_not_tell_is_unknown_and_not_zero() -> None:
    partial = _engine(4, 200, 100, 5)
    del partial["pool"]
    totals = Totals.of({"engines": [_engine(4, 200, 100, 5), partial]})
    assert (totals.pool_bytes, totals.used_bytes) == (None, None)
    assert totals.hot_bytes == 400


def test_a_counter_that_shrank_has_no_rate() -> None:
    before, after = (Totals.of({"engines": [_engine(1, 1, 1, n)]}) for n in (8, 12))
    assert rates(before, after, 2)["compactions"] == 2
    assert "compactions" not in rates(after, before, 2)
    assert rates(before, after, 0) == {}


def test_numbers_in_words() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 2**30, -(2**20), None)] == [
        *("0 B", "1023 B", "1.5 KiB", "1.0 GiB", "-1.0 MiB", UNKNOWN)
    ]
    assert [duration_text(n) for n in (5, 65, 3700, 90_000, None)] == ["5s", "1m 5s", "1h 1m", "1d 1h", UNKNOWN]
    assert (share_text(1, 4), share_text(1, 0), share_text(None, 4)) == ("25%", UNKNOWN, UNKNOWN)
    assert [rate_text(n) for n in (0, 0.123, 1.26, 1234)] == ["0", "0.1", "1.3", "1,234"]


def test_foreign_text_cannot_steer_the_terminal() -> None:
    shown = printable("\x1b[31mred\x07\r\n\u202eback")
    assert shown == "\ufffd[31mred\ufffd\ufffd\ufffd\ufffdback"
