# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Read a Dockerfile: its instructions, the variables in them, and the commands of a RUN.

Knows what docker/Dockerfile and docker/Dockerfile.cpu use and refuses the rest (here-documents, parser directives),
so that nothing is silently left out. For scripts/check_cpu_image.py and the tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

KEYWORDS = frozenset(
    ("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "USER", "VOLUME")
    + ("WORKDIR",)
)
_FLAG = re.compile(r"--(?P<name>[a-z-]+)(?:=(?P<value>\S+))?\s+")
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::(?P<how>[+-])(?P<word>(?:[^{}]|\$\{\w+\})*))?\}|(?P<plain>\w+))")
_ASSIGNMENT = re.compile(r"""(?P<name>[\w.]+)=(?P<value>"(?:[^"\\]|\\.)*"|\S+)\s*""")


class DockerfileError(ValueError):
    """A Dockerfile that this module does not understand: where, what, and what is understood."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continuation lines joined and its comments dropped."""

    line: int
    """Where it begins, counted from 1."""
    keyword: str
    value: str
    """What follows the flags."""
    flags: tuple[tuple[str, str], ...] = field(default=())
    """`--name=value` pairs before it, in order; a flag may come more than once."""

    def flag(self, name: str) -> str | None:
        """The value of a flag that comes at most once; None without it."""
        values = [value for given, value in self.flags if given == name]
        return values[0] if values else None

    def words(self) -> list[str]:
        """The value in exec form (a JSON array of strings).

        Raises
        ------
        DockerfileError
            It is in shell form, which puts a shell between the container's signals and the server.
        """
        try:
            words = json.loads(self.value)
        except json.JSONDecodeError as error:
            raise DockerfileError(
                f"line {self.line}: {self.keyword} {self.value}: not a JSON array ({error}); write "
                f'{self.keyword} ["program", "argument"]'
            ) from error
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DockerfileError(f"line {self.line}: {self.keyword} takes an array of strings, got {self.value}")
        return words

    def assignments(self) -> dict[str, str]:
        """The `name=value` pairs of ENV and LABEL, quotes removed, variables as they stand."""
        pairs, at = {}, 0
        while at < len(self.value):
            match = _ASSIGNMENT.match(self.value, at)
            if match is None:
                raise DockerfileError(f"line {self.line}: {self.value[at:]!r} is not name=value")
            text = match["value"]
            pairs[match["name"]] = text[1:-1].replace('\\"', '"') if text.startswith('"') else text
            at = match.end()
        return pairs


def parse(text: str) -> list[Instruction]:
    """All instructions in order.

    Raises
    ------
    DockerfileError
        An instruction outside `KEYWORDS`, a here-document, or a file that ends inside an instruction.
    """
    found: list[Instruction] = []
    parts: list[str] = []
    began = 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue  # also between continued lines
        began = began if parts else number
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            found.append(_instruction(began, " ".join(parts)))
            parts = []
    if parts:
        raise DockerfileError(f"line {began}: the file ends inside {parts[0]!r}")
    return found


def _instruction(line: int, text: str) -> Instruction:
    keyword, _, rest = text.partition(" ")
    if keyword.upper() not in KEYWORDS:
        raise DockerfileError(f"line {line}: instruction {keyword!r} is not one of {', '.join(sorted(KEYWORDS))}")
    if "<<" in rest:
        raise DockerfileError(f"line {line}: here-documents are not read; write the commands with && between them")
    flags: list[tuple[str, str]] = []
    rest = rest.strip()
    while match := _FLAG.match(rest):
        flags.append((match["name"], match["value"] or ""))
        rest = rest[match.end() :]
    return Instruction(line, keyword.upper(), rest, tuple(flags))


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Replace `$X`, `${X}`, `${X:-word}` and `${X:+word}`; an unknown variable is empty, as in a build."""

    def value(match: re.Match[str]) -> str:
        known = variables.get(match["braced"] or match["plain"], "")
        if match["how"] == "+":
            return expand(match["word"], variables) if known else ""
        if match["how"] == "-" and not known:
            return expand(match["word"], variables)
        return known

    return _VARIABLE.sub(value, text)


def commands(run: str) -> list[str]:
    """The commands of a RUN in shell form: what stands between `&&` outside of quotes and parentheses."""
    found, quote, depth, start, at = [], "", 0, 0, 0
    while at < len(run):
        letter = run[at]
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif run.startswith("&&", at) and depth == 0:
            found.append(run[start:at].strip())
            start = at + 2
            at += 1
        at += 1
    return [*found, run[start:].strip()]
