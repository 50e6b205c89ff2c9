# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Texts to look things up in: glossaries, instructions, numbered lists."""

from __future__ import annotations

from collections.abc import Iterator

from deltamem_vllm.calibration.corpus.parts import Parts
from deltamem_vllm.calibration.corpus.schemas import SCHEMAS, ask, record
from deltamem_vllm.calibration.corpus.unit import Ask, Unit

_GENERA = (
    "method",
    "tool",
    "unit of measure",
    "rule",
    "kind of fabric",
    "dance",
    "sort of bread",
    "river boat",
    "mineral",
)
_PURPOSES = (
    "to seal joints in cold weather",
    "when two readings disagree",
    "by sailors of the northern coast",
    "to keep accounts of small farms",
    "before paper was cheap",
    "to grade timber by its sound",
    "in schools for the training of the memory",
    "where water is scarce",
    "to mark the end of the harvest",
    "for work at great height",
)
_FOODS = (
    "flour", "butter", "lentils", "rice", "tomatoes", "chicken stock", "yoghurt", "oat flakes", "walnuts", "honey",
    "potatoes", "leeks", "olive oil", "chickpeas", "cream", "cinnamon", "spinach", "mushrooms", "salt", "raisins",
)  # fmt: skip
_UNITS = ("g", "ml", "tablespoons", "cups", "teaspoons")
_STEPS = (
    "Mix the {food} with {amount} of {other} and let it rest for {minutes} minutes.",
    "Heat {amount} of {food}, then add the {other} little by little.",
    "Bake it for {minutes} minutes at {heat} degrees.",
    "Stir in the {food} and cook for {minutes} minutes more.",
    "Season with {food} and put it aside for {minutes} minutes.",
    "Cut the {food} into pieces of the size of a coin.",
)
_SIDES, _PIECES = ("upper", "inner", "rear", "left"), ("valve", "lid", "sensor", "panel", "hinge")
_WORK = (
    "Loosen the {part} with a {size} mm key.",
    "Wait {minutes} minutes until the {part} has cooled down.",
    "Connect the {part} to port {port} and press both buttons.",
    "Turn the {part} by {turn} degrees to the left.",
    "Check that the {part} shows the number {number}.",
    "Write down the date next to the {part}.",
)


def glossary(parts: Parts) -> Iterator[Unit]:
    """Words that do not exist and what they mean."""
    while True:
        word = parts.new(parts.coined)
        genus, purpose = parts.one(_GENERA), parts.one(_PURPOSES)
        origin, year = parts.place(), str(parts.rng.randrange(1400, 1990))
        see = f" See also {parts.coined()}." if parts.rng.random() < 0.4 else ""
        text = f"{word.title()} (n.): a {genus} used {purpose}; first described in {origin} in {year}.{see}\n"
        asks = (
            Ask(f"How is a {word} used?", f"used {purpose}"),
            Ask(f"In which year was the {word} first described?", year),
            Ask(f"Where was the {word} first described?", origin),
            Ask(f"What sort of thing is a {word}?", f"a {genus}"),
        )
        yield Unit(text, (parts.one(asks),))


def instructions(parts: Parts) -> Iterator[Unit]:
    """Recipes and manuals in numbered steps."""
    while True:
        yield from _recipe(parts) if parts.rng.random() < 0.5 else _manual(parts)


def numbered(parts: Parts) -> Iterator[Unit]:
    """Long lists: numbered or with dashes, of records or of agenda items."""
    while True:
        schema, dashes = parts.one(SCHEMAS), parts.rng.random() < 0.3
        fields = tuple(parts.rng.sample(schema.fields, 2))
        yield Unit(f"{schema.title.capitalize()} - short form, as of {parts.spoken_date()}\n")
        for i in range(1, parts.rng.randrange(12, 40)):
            entry = record(parts, schema, fields)
            told = "; ".join(f"{label}: {value}" for label, value in entry.values)
            yield Unit(f"{'-' if dashes else f'{i})'} {entry.key} ({told})\n", ask(parts, entry))
        yield Unit("\n")


def _recipe(parts: Parts) -> Iterator[Unit]:
    name = parts.new(
        lambda: f"{parts.coined().title()} {parts.one(('stew', 'pie', 'salad', 'bread', 'pudding', 'soup'))}"
    )
    serves = str(parts.rng.randrange(2, 13))
    yield Unit(f"{name}\nServes {serves}.\n\nIngredients:\n", (Ask(f"How many people does the {name} serve?", serves),))
    foods = parts.rng.sample(_FOODS, parts.rng.randrange(4, 8))
    for food in foods:
        amount = f"{parts.rng.randrange(1, 60) * 5} {parts.one(_UNITS)}"
        yield Unit(f"- {amount} of {food}\n", (Ask(f"How much {food} goes into the {name}?", amount),))
    yield Unit("\n")
    for i in range(1, parts.rng.randrange(4, 9)):
        food, other = parts.rng.sample(foods, 2)
        step = parts.one(_STEPS).format(
            food=food,
            other=other,
            amount=f"{parts.rng.randrange(1, 40) * 5} {parts.one(_UNITS)}",
            minutes=parts.rng.randrange(2, 90),
            heat=parts.rng.randrange(14, 25) * 10,
        )
        yield Unit(f"{i}. {step}\n", (Ask(f"Quote step {i} of the recipe for {name}.", step),))
    yield Unit("\n")


def _manual(parts: Parts) -> Iterator[Unit]:
    name = parts.new(lambda: f"{parts.product()} {parts.model()}")
    yield Unit(f"Manual of the {name}\n\n")
    for i in range(1, parts.rng.randrange(6, 16)):
        step = parts.one(_WORK).format(
            part=f"{parts.one(_SIDES)} {parts.one(_PIECES)}",
            size=parts.rng.randrange(4, 30),
            minutes=parts.rng.randrange(2, 60),
            port=f"{parts.one('ABCD')}{parts.rng.randrange(1, 9)}",
            turn=parts.rng.randrange(1, 12) * 15,
            number=parts.digits(4),
        )
        yield Unit(f"Step {i}: {step}\n", (Ask(f"What is to be done in step {i} with the {name}?", step),))
    yield Unit("\n")
