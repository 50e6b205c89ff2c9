# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Text like source code: it has the look of programs and does nothing."""

from __future__ import annotations

from collections.abc import Iterator

from deltamem_vllm.calibration.corpus.parts import Parts
from deltamem_vllm.calibration.corpus.unit import Ask, Unit


def code(parts: Parts) -> Iterator[Unit]:
    """Functions, classes and constants in the look of Python or of C."""
    braces = parts.rng.random() < 0.4
    while True:
        kind = parts.rng.randrange(5)
        if kind == 0:
            yield from _constants(parts, braces)
        elif kind == 1 and not braces:
            yield from _class(parts)
        else:
            yield _function(parts, braces)


def _constants(parts: Parts, braces: bool) -> Iterator[Unit]:
    for _ in range(parts.rng.randrange(2, 6)):
        name = parts.new(lambda: f"{parts.identifier()}_{parts.coined()}".upper())
        value = parts.one((parts.quantity(), f"0x{parts.hexadecimal(8)}", f'"{parts.coined()}-{parts.digits(3)}"'))
        line = f"#define {name} {value}\n" if braces else f"{name} = {value}\n"
        yield Unit(line, (Ask(f"Which literal is the constant {name} defined as?", value),))
    yield Unit("\n")


def _class(parts: Parts) -> Iterator[Unit]:
    name = parts.new(lambda: f"{parts.noun()}{parts.coined().title()}".title())
    base = f"Base{parts.noun().title()}"
    asks = (Ask(f"Which class does {name} derive from?", base),)
    yield Unit(f'class {name}({base}):\n    """Keeps a {parts.noun()} for each {parts.noun()}."""\n\n', asks)
    for _ in range(parts.rng.randrange(1, 4)):
        function = _function(parts, False)
        text = "".join(f"    {line}\n" if line else "\n" for line in function.text.rstrip().split("\n"))
        yield Unit(f"{text}\n", function.asks)


def _function(parts: Parts, braces: bool) -> Unit:
    name = parts.new(lambda: f"{parts.identifier()}_{parts.coined()}")
    one, other = parts.rng.sample([parts.noun(), f"{parts.noun()}_id", f"max_{parts.noun()}s", parts.coined()], 2)
    limit, error = parts.quantity(), f"{parts.noun()} {parts.one(('not found', 'too large', 'is empty', 'expired'))}"
    helper = f"{parts.verb()}_{parts.coined()}"
    asks = (
        Ask(f"With what text does {name} report an error?", error),
        Ask(f"Which helper does {name} call on its input?", helper),
        Ask(f"Above which limit does {name} give up?", limit),
    )
    if braces:
        text = (
            f"static int {name}(struct {one} *{one}, size_t {other}) {{\n"
            f"    if ({other} > {limit}) {{\n"
            f'        return fail("{error}");\n'
            f"    }}\n"
            f"    /* {parts.verb()} before {parts.verb()} */\n"
            f"    {one}->{parts.noun()} = {helper}({one});\n"
            f"    return {one}->{parts.noun()} - {parts.quantity()};\n"
            f"}}\n\n"
        )
    else:
        text = (
            f"def {name}({one}, {other}={parts.quantity()}):\n"
            f'    """{parts.verb().title()} the {parts.noun()} of a {parts.noun()}."""\n'
            f"    if len({one}) > {limit}:\n"
            f'        raise ValueError("{error}")\n'
            f"    for item in {helper}({one}):\n"
            f"        {other} += item.{parts.noun()} * {parts.quantity()}\n"
            f"    return {other}\n\n"
        )
    return Unit(text, (parts.one(asks),))
