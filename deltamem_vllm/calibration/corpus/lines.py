# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Texts of lines: logs, settings, and boilerplate that repeats with something unique in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from deltamem_vllm.calibration.corpus.parts import Parts
from deltamem_vllm.calibration.corpus.unit import Ask, Unit

_LEVELS = ("INFO", "INFO", "INFO", "DEBUG", "WARN", "ERROR")
_ROUTINE = (
    "health check passed",
    "connection accepted from {address}",
    "{noun} {noun} finished in {quantity} ms",
    "retrying {verb} of {noun} ({quantity} left)",
    "GET /api/{noun}/{quantity} 200 {quantity}ms",
    "heartbeat {quantity}",
    "flushed {quantity} entries of {noun}",
    "garbage collection took {quantity} ms",
)
_BOILERPLATE = (
    "This page was left blank on purpose by the publisher of the form.",
    "All rights reserved. Reproduction needs the written consent of {firm}.",
    "Please consider the environment before you print this message.",
    "-- end of section --",
    "You receive this notice because you subscribed to updates about {noun} changes.",
    "Status unchanged since the last inspection; no action is required.",
    "Press any button to go on. Press any button to go on.",
    "Entry verified by the night desk, nothing to add.",
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit.",
    "Terms and conditions apply. See the reverse of this sheet for details.",
)


def log(parts: Parts) -> Iterator[Unit]:
    """Lines of a program's log; some tell of a thing with an identifier."""
    day, seconds = parts.date(), parts.rng.randrange(60_000)
    services = [parts.host() for _ in range(parts.rng.randrange(2, 6))]
    while True:
        # Days go on at midnight with another date, which may lie anywhere: nobody reads logs for their calendar.
        seconds += parts.rng.randrange(1, 90)
        if seconds >= 86_400:
            day, seconds = parts.date(), seconds - 86_400
        stamp = f"{day} {seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        head = f"{stamp} [{parts.one(services)}] "
        if parts.rng.random() < 0.6:
            yield Unit(f"{head}{parts.one(_LEVELS)} {_filled(parts, parts.one(_ROUTINE))}\n")
        else:
            message, asks = parts.one(_EVENTS)(parts)
            yield Unit(
                f"{head}{parts.one(_LEVELS)} {message}\n",
                (*asks, Ask(f"At what time was this logged: {message}", stamp))[:2],
            )


def config(parts: Parts) -> Iterator[Unit]:
    """Settings in sections, in the notations of ini, YAML, properties and environment files."""
    while True:
        style = parts.rng.randrange(4)
        for _ in range(parts.rng.randrange(3, 9)):
            section = parts.new(lambda: f"{parts.noun()}.{parts.coined()}")
            heading = (f"[{section}]\n", f"{section}:\n", f"# {section}\n", f"## settings of {section}\n")[style]
            yield Unit(heading)
            used: set[str] = set()
            for _ in range(parts.rng.randrange(3, 9)):
                name = parts.identifier()
                if name in used:
                    continue
                used.add(name)
                value = parts.one(_VALUES)(parts)
                remark = f"  # {parts.verb()} the {parts.noun()} first" if parts.rng.random() < 0.15 else ""
                line = (
                    f"{name} = {value}",
                    f"  {name}: {value}",
                    f"{section}.{name}={value}",
                    f"export {section.replace('.', '_').upper()}_{name.upper()}={value}",
                )[style]
                question = parts.one(
                    ("What is {name} set to in {section}?", "Which setting does {section} have for {name}?")
                )
                yield Unit(f"{line}{remark}\n", (Ask(question.format(name=name, section=section), value),))
            yield Unit("\n")


def filler(parts: Parts) -> Iterator[Unit]:
    """The same few lines again and again, with small changes, and something unique between them now and then."""
    frames = [_filled(parts, line) for line in parts.rng.sample(_BOILERPLATE, parts.rng.randrange(2, 5))]
    numbered = parts.rng.random() < 0.5
    count = 0
    while True:
        for _ in range(parts.rng.randrange(2, 9)):
            count += 1
            yield Unit(f"{f'{count}. ' if numbered else ''}{parts.one(frames)}\n")
        message, asks = parts.one(_EVENTS)(parts)
        yield Unit(f"{message[0].upper()}{message[1:]}.\n", asks)


def _filled(parts: Parts, line: str) -> str:
    return line.format(
        address=parts.address(), noun=parts.noun(), verb=parts.verb(), quantity=parts.quantity(), firm=parts.firm()
    )


def _login(parts: Parts) -> tuple[str, tuple[Ask, ...]]:
    who, where = parts.new(parts.email), parts.address()
    return f"user {who} signed in from {where}", (Ask(f"From which address did {who} sign in?", where),)


def _failure(parts: Parts) -> tuple[str, tuple[Ask, ...]]:
    request, reason = parts.new(parts.uuid), f"{parts.noun()} {parts.noun()} error {parts.digits(4)}"
    return f"request {request} failed: {reason}", (Ask(f"Why did request {request} fail?", reason),)


def _payment(parts: Parts) -> tuple[str, tuple[Ask, ...]]:
    number, amount, who = parts.new(parts.code), parts.amount(), parts.person()
    asks = (Ask(f"How much was paid with transfer {number}?", amount), Ask(f"Who made transfer {number}?", who))
    return f"transfer {number} of {amount} by {who} was booked", (parts.one(asks),)


def _checksum(parts: Parts) -> tuple[str, tuple[Ask, ...]]:
    file, digest = parts.new(lambda: f"{parts.identifier()}_{parts.digits(3)}.dat"), parts.hexadecimal(16)
    return f"wrote {file} with checksum {digest}", (Ask(f"Give me the checksum of {file}.", digest),)


def _release(parts: Parts) -> tuple[str, tuple[Ask, ...]]:
    unit, version = parts.new(parts.host), parts.version()
    return f"{unit} was upgraded to version {version}", (Ask(f"To which version was {unit} upgraded?", version),)


def _call(parts: Parts) -> tuple[str, tuple[Ask, ...]]:
    who, number = parts.new(parts.person), parts.phone()
    return f"{who} asked to be called back at {number}", (Ask(f"At which number can {who} be called back?", number),)


def _parcel(parts: Parts) -> tuple[str, tuple[Ask, ...]]:
    parcel, place, day = parts.new(parts.code), parts.place(), parts.spoken_date()
    asks = (Ask(f"Where was parcel {parcel} left?", place), Ask(f"When was parcel {parcel} left?", day))
    return f"parcel {parcel} was left in {place} on {day}", (parts.one(asks),)


_EVENTS: tuple[Callable[[Parts], tuple[str, tuple[Ask, ...]]], ...] = (
    _login,
    _failure,
    _payment,
    _checksum,
    _release,
    _call,
    _parcel,
)
_VALUES: tuple[Callable[[Parts], str], ...] = (
    Parts.quantity,
    Parts.address,
    Parts.percent,
    Parts.version,
    lambda parts: parts.one(("true", "false", "auto", "null", "strict", "never")),
    lambda parts: f"/{parts.one(('var', 'srv', 'opt'))}/{parts.noun()}/{parts.coined()}",
    lambda parts: f"https://{parts.coined()}.example/{parts.noun()}",
    lambda parts: parts.hexadecimal(20),
    lambda parts: f"{parts.quantity()}{parts.one(('ms', 's', 'MiB', 'KiB'))}",
)


def event(parts: Parts) -> Unit:
    """One event as a sentence."""
    message, asks = parts.one(_EVENTS)(parts)
    return Unit(f"{message[0].upper()}{message[1:]}. ", asks)
