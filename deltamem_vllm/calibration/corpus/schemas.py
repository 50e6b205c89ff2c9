# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Kinds of records: what a record is known by, and what it says. Tables, lists and files are made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from deltamem_vllm.calibration.corpus.parts import Parts
from deltamem_vllm.calibration.corpus.unit import Ask

Make = Callable[[Parts], str]

_DEPARTMENTS = ("Sales", "Legal", "Research", "Purchasing", "Support", "Quality", "Design", "Payroll", "Facilities")
_STATES = ("open", "closed", "pending", "on hold", "shipped", "returned", "draft", "approved", "cancelled")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_SYSTEMS = ("Debian 12", "Ubuntu 22.04", "FreeBSD 14", "Alpine 3.19", "Fedora 40", "Windows 11", "macOS 14")
_QUESTIONS = (
    "Which {field} is listed for {key}?",
    "Look up {key}: what does the column {field} say?",
    "{title}, entry {key}: which {field}?",
    "Please give me only the {field} of {key}.",
    "Check the {title} again. The {field} next to {key} is?",
    "I need the {field} that belongs to {key}.",
)


class Field(NamedTuple):
    """Something a record says."""

    label: str
    make: Make


@dataclass(frozen=True)
class Schema:
    """A kind of record: its title, what names a record, and what it says."""

    title: str
    key: Field
    fields: tuple[Field, ...]


class Record(NamedTuple):
    """What names it, and label and value of what it says."""

    schema: Schema
    key: str
    values: tuple[tuple[str, str], ...]


def record(parts: Parts, schema: Schema, fields: tuple[Field, ...] | None = None) -> Record:
    """A record whose key the text has not had yet, with all fields of its schema or these."""
    key = parts.new(lambda: schema.key.make(parts))
    return Record(schema, key, tuple((field.label, field.make(parts)) for field in fields or schema.fields))


def ask(parts: Parts, entry: Record) -> tuple[Ask, ...]:
    """A question about one of its fields."""
    field, value = parts.one(entry.values)
    wording = parts.one(_QUESTIONS)
    return (Ask(wording.format(field=field, key=entry.key, title=entry.schema.title), value),)


SCHEMAS = (
    Schema(
        "staff directory",
        Field("name", Parts.person),
        (
            Field("department", lambda parts: parts.one(_DEPARTMENTS)),
            Field("e-mail", Parts.email),
            Field("phone", Parts.phone),
            Field("office", lambda parts: f"{parts.one('ABCDEF')}{parts.digits(3)}"),
            Field("hired", Parts.date),
        ),
    ),
    Schema(
        "order book",
        Field("order", Parts.code),
        (
            Field("customer", Parts.person),
            Field("item", Parts.product),
            Field("quantity", Parts.quantity),
            Field("total", Parts.amount),
            Field("status", lambda parts: parts.one(_STATES)),
        ),
    ),
    Schema(
        "sensor overview",
        Field("sensor", Parts.model),
        (
            Field("site", Parts.place),
            Field("reading", lambda parts: f"{parts.rng.uniform(-40, 140):.2f}"),
            Field("battery", Parts.percent),
            Field("last seen", lambda parts: f"{parts.date()} {parts.clock()}"),
        ),
    ),
    Schema(
        "timetable",
        Field("train", lambda parts: f"{parts.one(('IC', 'RE', 'S', 'EX'))} {parts.digits(4)}"),
        (
            Field("origin", Parts.place),
            Field("destination", Parts.place),
            Field("departure", Parts.clock),
            Field("platform", lambda parts: str(parts.rng.randrange(1, 24))),
        ),
    ),
    Schema(
        "subscription export",
        Field("account", Parts.uuid),
        (
            Field("owner", Parts.email),
            Field("plan", lambda parts: parts.one(("free", "basic", "team", "business", "trial"))),
            Field("balance", Parts.amount),
            Field("renewal", Parts.spoken_date),
        ),
    ),
    Schema(
        "stock list",
        Field("article", lambda parts: f"{parts.digits(3)}-{parts.digits(3)}-{parts.digits(2)}"),
        (
            Field("description", Parts.product),
            Field("in stock", Parts.quantity),
            Field("unit price", Parts.amount),
            Field("supplier", Parts.firm),
            Field("shelf", lambda parts: f"{parts.one('KLMNP')}-{parts.rng.randrange(1, 60)}"),
        ),
    ),
    Schema(
        "host inventory",
        Field("host", Parts.host),
        (
            Field("address", Parts.address),
            Field("system", lambda parts: parts.one(_SYSTEMS)),
            Field("serial", lambda parts: parts.hexadecimal(12).upper()),
            Field("contact", Parts.person),
        ),
    ),
    Schema(
        "course plan",
        Field("course", lambda parts: f"{parts.one(('HIST', 'CHEM', 'ECON', 'MATH', 'LING'))} {parts.digits(4)}"),
        (
            Field("lecturer", Parts.person),
            Field("day", lambda parts: parts.one(_DAYS)),
            Field("begins", Parts.clock),
            Field("room", lambda parts: f"{parts.one(('Hall', 'Lab', 'Room'))} {parts.digits(3)}"),
            Field("seats", Parts.quantity),
        ),
    ),
)
