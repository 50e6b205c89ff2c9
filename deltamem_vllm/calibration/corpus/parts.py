# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Names, numbers and identifiers that generated texts are made of. All words are ours and none is an evaluation's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_FIRST = (
    "Alice", "Hugo", "Miriam", "Dmitri", "Farah", "Leon", "Chloe", "Rashid", "Ingrid", "Paolo", "Sofia", "Kenji",
    "Amara", "Viktor", "Elena", "Samuel", "Priya", "Lucas", "Hanna", "Omar", "Clara", "Mateo", "Yuki", "Daniel",
    "Freya", "Ibrahim", "Noemi", "Patrick", "Rosa", "Stefan", "Tessa", "Walter", "Zoe", "Arjun", "Beatriz", "Colin",
)  # fmt: skip
_LAST = (
    "Abbott", "Becker", "Castillo", "Dalgaard", "Eriksen", "Fontaine", "Goldberg", "Hayashi", "Ivanov", "Jansen",
    "Keller", "Lombardi", "Mbeki", "Nakamura", "Oliveira", "Pereira", "Quinn", "Rossi", "Singh", "Thompson", "Ueda",
    "Valdez", "Whitaker", "Yilmaz", "Zhang", "Ashford", "Bergman", "Chaudhry", "Dubois", "Egan", "Fischer", "Grant",
)  # fmt: skip
_PLACES = (
    "Ashbourne", "Millgate", "Port Ellery", "Stonebridge", "Lakeview", "Northfield", "Elmhurst", "Riverton",
    "Granville", "Fairhaven", "Oakridge", "Westbrook", "Clearwater", "Holloway", "Kingsport", "Maplewood", "Redcliff",
    "Summerset", "Thornbury", "Unity Hill", "Valebrook", "Winterford", "Eastleigh", "Harborne",
)  # fmt: skip
_FIRM_A = (
    "Blue",
    "Delta",
    "Iron",
    "Nova",
    "Prime",
    "Quantum",
    "River",
    "Silver",
    "Summit",
    "Vertex",
    "Bright",
    "Atlas",
)
_FIRM_B = ("Foods", "Logistics", "Labs", "Partners", "Systems", "Textiles", "Energy", "Media", "Robotics", "Travel")
_FIRM_C = ("Ltd", "Inc", "GmbH", "Group", "Co", "LLC")
_MAKE = (
    "compact", "wireless", "folding", "ceramic", "stainless", "portable", "rechargeable", "wooden", "insulated",
    "digital", "adjustable", "waterproof", "lightweight", "magnetic", "padded", "heavy-duty",
)  # fmt: skip
_THING = (
    "kettle", "backpack", "desk lamp", "headset", "keyboard", "tripod", "toolbox", "water bottle", "notebook",
    "charger", "monitor stand", "cutting board", "sleeping bag", "bicycle pump", "thermostat", "router", "blender",
    "office chair", "camera strap", "socket set", "drill", "umbrella", "storage bin", "wall clock",
)  # fmt: skip
_NOUNS = (
    "invoice", "session", "buffer", "order", "account", "index", "cache", "report", "queue", "profile", "ticket",
    "packet", "record", "filter", "token", "channel", "batch", "schema", "vector", "module", "region", "stream",
    "worker", "schedule", "budget", "catalog", "payment", "handler", "client", "device",
)  # fmt: skip
_VERBS = (
    "load", "parse", "merge", "update", "check", "build", "send", "fetch", "resolve", "format", "split", "encode",
    "validate", "sort", "close", "open", "store", "filter", "compute", "render",
)  # fmt: skip
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
_SYLLABLES = ("bra", "cor", "dex", "fil", "gan", "hel", "jor", "kim", "lun", "mor", "nev", "pol", "ras", "sil", "tor")
_HEX = "0123456789abcdef"
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_TRIES = 1000


class Parts:
    """Draws parts of texts from one generator of random numbers.

    Parameters
    ----------
    rng : random.Random
        What decides everything.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._given: set[str] = set()

    def one(self, items: Sequence[Item]) -> Item:
        """One of them."""
        return self.rng.choice(items)

    def new(self, make: Callable[[], str]) -> str:
        """What `make` returns, again until it is something that this method has not returned before."""
        for _ in range(_TRIES):
            made = make()
            if made not in self._given:
                self._given.add(made)
                return made
        raise RuntimeError(
            f"{_TRIES} times nothing new in a text, the last {made!r}; it is too long for this generator"
        )

    def digits(self, count: int) -> str:
        """So many digits, the first of them not zero."""
        return str(self.rng.randrange(10 ** (count - 1), 10**count))

    def hexadecimal(self, count: int) -> str:
        """So many hexadecimal digits."""
        return "".join(self.rng.choices(_HEX, k=count))

    def person(self) -> str:
        """First and last name, at times with an initial between them."""
        middle = f" {self.one(_LETTERS)}." if self.rng.random() < 0.25 else ""
        return f"{self.one(_FIRST)}{middle} {self.one(_LAST)}"

    def first_name(self) -> str:
        """First name."""
        return self.one(_FIRST)

    def email(self) -> str:
        """E-mail address."""
        host = f"{self.one(_FIRM_A)}-{self.one(_FIRM_B)}".lower()
        return f"{self.one(_FIRST)}.{self.one(_LAST)}{self.rng.randrange(100)}@{host}.example".lower()

    def phone(self) -> str:
        """Telephone number, in one of several notations."""
        a, b, c = self.digits(3), self.digits(3), self.digits(4)
        return self.one(
            (f"+{self.digits(2)} {a} {b} {c}", f"({a}) {b}-{c}", f"{a}-{b}-{c}", f"0{a}/{b} {c[:2]} {c[2:]}")
        )

    def uuid(self) -> str:
        """Five groups of hexadecimal digits."""
        return "-".join(self.hexadecimal(count) for count in (8, 4, 4, 4, 12))

    def date(self) -> str:
        """Day, in the notation of machines."""
        return f"{self.rng.randrange(1987, 2031)}-{self.rng.randrange(1, 13):02d}-{self.rng.randrange(1, 29):02d}"

    def spoken_date(self) -> str:
        """Day, as people write it."""
        return f"{self.rng.randrange(1, 29)} {self.one(_MONTHS)} {self.rng.randrange(1987, 2031)}"

    def clock(self) -> str:
        """Hour and minute."""
        return f"{self.rng.randrange(24):02d}:{self.rng.randrange(60):02d}"

    def amount(self) -> str:
        """Sum of money."""
        number = self.rng.randrange(100, 10 ** self.rng.randrange(4, 8)) / 100
        return self.one((f"${number:,.2f}", f"{number:.2f} EUR", f"USD {number:.2f}", f"{number:,.2f}"))

    def quantity(self) -> str:
        """Number of things."""
        return str(self.rng.randrange(1, 10 ** self.rng.randrange(2, 5)))

    def percent(self) -> str:
        """Percentage."""
        return f"{self.rng.randrange(1, 1000) / 10:.1f}%"

    def place(self) -> str:
        """Town that does not exist."""
        return self.one(_PLACES)

    def firm(self) -> str:
        """Company that does not exist."""
        return f"{self.one(_FIRM_A)}{self.one(('', ' ', '-'))}{self.one(_FIRM_B)} {self.one(_FIRM_C)}"

    def product(self) -> str:
        """Thing to buy."""
        return f"{self.one(_MAKE)} {self.one(_THING)}"

    def model(self) -> str:
        """Number of a model, part or case: letters and digits."""
        letters = "".join(self.rng.choices(_LETTERS, k=self.rng.randrange(1, 4)))
        return f"{letters}{self.one(('-', '', '/'))}{self.digits(self.one((3, 4)))}{self.one(('', '', 'a', '-X'))}"

    def code(self) -> str:
        """Identifier of some sort, such as orders and tickets have."""
        kind = self.rng.randrange(4)
        if kind == 0:
            return f"{''.join(self.rng.choices(_LETTERS, k=2))}-{self.digits(4)}-{self.digits(2)}"
        if kind == 1:
            return f"#{self.digits(6)}"
        if kind == 2:
            return self.hexadecimal(10)
        return f"{self.digits(3)}.{self.digits(4)}"

    def address(self) -> str:
        """Address in a network."""
        return f"10.{self.rng.randrange(256)}.{self.rng.randrange(256)}.{self.rng.randrange(1, 255)}"

    def version(self) -> str:
        """Version of a program."""
        return f"{self.rng.randrange(10)}.{self.rng.randrange(30)}.{self.rng.randrange(100)}"

    def noun(self) -> str:
        """Thing that programs have."""
        return self.one(_NOUNS)

    def verb(self) -> str:
        """What programs do to things."""
        return self.one(_VERBS)

    def identifier(self) -> str:
        """Name in a program, in snake case."""
        return "_".join([self.one(_NOUNS), self.one(_NOUNS)] if self.rng.random() < 0.5 else [self.verb(), self.noun()])

    def coined(self) -> str:
        """Word that does not exist."""
        return "".join(self.rng.choices(_SYLLABLES, k=self.rng.randrange(2, 4)))

    def host(self) -> str:
        """Name of a computer."""
        return f"{self.one(_NOUNS)}-{self.coined()}-{self.rng.randrange(1, 100):02d}"
