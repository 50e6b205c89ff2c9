# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What can be chosen about a measurement of codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deltamem_vllm.evaluation.codec.errors import CodecError

REFERENCES: Final = ("none", "page", "token", "layer")
"""What a token is coded as a difference from."""
BITS: Final = range(2, 9)
EXACT_BITS: Final = 16
"""Of what is not coded."""
SINKS: Final = 4
"""First positions of a sequence: exact, as deltamem protects them, or coded like the rest to see what that does."""
QUERIES: Final = 32
"""Newest queries of a text by which the change of attention's output is measured."""

_FEWEST_TOKENS: Final = 2 * QUERIES


@dataclass(frozen=True)
class Settings:
    """What decides, with the model, what comes out.

    Attributes
    ----------
    tokens : int
        Of each text that is coded, without what the model's template puts before it.
    texts : int
        Texts held out to measure with.
    continuation : int
        Tokens after each text whose probabilities are compared.
    bits : tuple of int
        Of an element's code.
    page_tokens : tuple of int
        Tokens of a block of vLLM: what a page holds uncoded, in 16 bits, and thereby the bytes of a page.
    references : tuple of str
        Of `REFERENCES`.
    fit_texts : int
        Texts to fit the maps between layers on.
    seed : int
        Of the texts.

    Raises
    ------
    CodecError
        One of them is out of range.
    """

    tokens: int = 1024
    texts: int = 4
    continuation: int = 64
    bits: tuple[int, ...] = (8, 4, 3, 2)
    page_tokens: tuple[int, ...] = (32,)
    references: tuple[str, ...] = REFERENCES
    fit_texts: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", _FEWEST_TOKENS), ("texts", 1), ("continuation", 1), ("fit_texts", 1)):
            if getattr(self, name) < least:
                raise CodecError(f"{_flag(name)}: got {getattr(self, name)}, allowed: {least} or more")
        if self.seed < 0:
            raise CodecError(f"--seed: got {self.seed}, allowed: 0 or more")
        for name in ("bits", "page_tokens", "references"):
            _check_list(name, getattr(self, name))
        wrong = [bits for bits in self.bits if bits not in BITS]
        if wrong:
            raise CodecError(f"--bits: got {_joined(wrong)}, allowed: {BITS[0]} to {BITS[-1]}")
        wrong = [tokens for tokens in self.page_tokens if tokens < 1]
        if wrong:
            raise CodecError(f"--page-tokens: got {_joined(wrong)}, allowed: 1 or more; vLLM's blocks have 16 to 128")
        unknown = [name for name in self.references if name not in REFERENCES]
        if unknown:
            raise CodecError(f"--references: got {_joined(unknown)}, allowed: {', '.join(REFERENCES)}")


def parse_numbers(name: str, text: str) -> tuple[int, ...]:
    """Read a flag's whole numbers, separated by commas."""
    try:
        return tuple(int(part) for part in _parts(text))
    except ValueError as error:
        raise CodecError(
            f"{_flag(name)}: got {text!r}, allowed: whole numbers separated by commas, such as 8,4,2"
        ) from error


def parse_names(text: str) -> tuple[str, ...]:
    """Read a flag's names, separated by commas."""
    return tuple(_parts(text))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _check_list(name: str, given: tuple[object, ...]) -> None:
    if not given:
        raise CodecError(f"{_flag(name)}: got an empty list; give one entry or more, or drop the flag for the default")
    if len(set(given)) != len(given):
        raise CodecError(f"{_flag(name)}: got {_joined(given)}; give each once")


def _joined(given: object) -> str:
    assert isinstance(given, (list, tuple))
    return ",".join(map(str, given))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
