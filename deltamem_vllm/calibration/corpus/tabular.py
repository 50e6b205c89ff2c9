# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Texts of records: tables, files of records, and catalogues."""

from __future__ import annotations

import json
from collections.abc import Iterator

from deltamem_vllm.calibration.corpus.parts import Parts
from deltamem_vllm.calibration.corpus.schemas import SCHEMAS, Record, ask, record
from deltamem_vllm.calibration.corpus.unit import Ask, Unit

_RATINGS = ("best seller", "new this season", "last pieces", "two years of warranty", "ships within 3 days")


def tables(parts: Parts) -> Iterator[Unit]:
    """Tables of several kinds of records, each in one of the usual notations."""
    while True:
        schema = parts.one(SCHEMAS)
        fields = tuple(parts.rng.sample(schema.fields, parts.rng.randrange(2, len(schema.fields) + 1)))
        style = parts.one((" | ", ",", ";", "\t"))
        heading = style.join([schema.key.label, *(field.label for field in fields)])
        rule = "--- | " * len(fields) + "---\n" if style == " | " else ""
        yield Unit(f"{parts.one(('Table', 'Sheet', 'Export'))}: {schema.title}, {parts.place()}\n{heading}\n{rule}")
        for _ in range(parts.rng.randrange(8, 30)):
            row = record(parts, schema, fields)
            cells = [row.key, *(value for _, value in row.values)]
            if style == ",":
                cells = [f'"{cell}"' if "," in cell else cell for cell in cells]
            yield Unit(f"{style.join(cells)}\n", ask(parts, row))
        yield Unit("\n")


def records(parts: Parts) -> Iterator[Unit]:
    """Files of records: JSON, YAML, XML, or a field a line."""
    while True:
        schema, style = parts.one(SCHEMAS), parts.one(_STYLES)
        yield Unit(f"{schema.title.replace(' ', '_')}_{parts.date().replace('-', '')}\n")
        for _ in range(parts.rng.randrange(5, 20)):
            entry = record(parts, schema)
            yield Unit(style(entry), ask(parts, entry))
        yield Unit("\n")


def products(parts: Parts) -> Iterator[Unit]:
    """A catalogue: things with numbers, prices and remarks."""
    count = 0
    while True:
        yield Unit(f"{parts.firm()} - {parts.one(('Catalogue', 'Price list', 'Offers'))} {parts.spoken_date()}\n\n")
        for _ in range(parts.rng.randrange(10, 30)):
            count += 1
            number, name, price = parts.new(parts.model), parts.product(), parts.amount()
            stock, remark = parts.quantity(), parts.one(_RATINGS)
            text = (
                f"{count:>3}. {name.capitalize()} (no. {number})\n     {price} per piece, {stock} available, {remark}\n"
            )
            asks = (
                Ask(f"How much does article no. {number} cost?", price),
                Ask(f"What kind of product has the number {number}?", name.capitalize()),
            )
            yield Unit(text, (parts.one(asks),))


def sentence(parts: Parts) -> Unit:
    """A record of any kind, told in a sentence."""
    entry = record(parts, parts.one(SCHEMAS))
    told = ", ".join(f"{label} {value}" for label, value in entry.values)
    return Unit(f"{entry.schema.title.capitalize()}, {entry.schema.key.label} {entry.key}: {told}. ", ask(parts, entry))


def _json(entry: Record) -> str:
    content = {entry.schema.key.label: entry.key, **dict(entry.values)}
    return f"{json.dumps(content)}\n"


def _indented(entry: Record) -> str:
    content = {entry.schema.key.label: entry.key, "data": dict(entry.values)}
    return f"{json.dumps(content, indent=2)},\n"


def _yaml(entry: Record) -> str:
    lines = "".join(f"  {label.replace(' ', '_')}: {value}\n" for label, value in entry.values)
    return f"- {entry.schema.key.label}: {entry.key}\n{lines}"


def _xml(entry: Record) -> str:
    inner = "".join(f"<{label.replace(' ', '-')}>{value}</{label.replace(' ', '-')}>" for label, value in entry.values)
    return f'<entry {entry.schema.key.label}="{entry.key}">{inner}</entry>\n'


def _block(entry: Record) -> str:
    lines = "".join(f"{label.capitalize()}: {value}\n" for label, value in entry.values)
    return f"{entry.schema.key.label.upper()}: {entry.key}\n{lines}\n"


_STYLES = (_json, _indented, _yaml, _xml, _block)
