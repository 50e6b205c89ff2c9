# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Ways to code a whole cache, and how many bits each really takes: codes, scales, zeros, bases, header, what is left.

Every scheme is laid out in pages of the same bytes, as deltamem's pool has them. How many tokens fit differs, and bits
an element are those of the page over the elements in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deltamem_vllm.codec.cold_page import BITS as SERVED_BITS
from deltamem_vllm.codec.cold_page import HEADER_BYTES
from deltamem_vllm.codec.rounding import Along
from deltamem_vllm.evaluation.codec.errors import CodecError

_PARAMETER_BITS: Final = 16  # float16, of a scale, a zero or a base
_MODEL_BYTES: Final = 2  # of an element of a page that is not coded
_POSITION_BITS: Final = 32
_TOKEN_STEP: Final = 4  # as in a cold page
FIRST_LAYER_BITS: Final = 4
"""Fewest bits of layer 0 where other layers are coded as differences: all of them rest on it."""


@dataclass(frozen=True)
class Coding:
    """How keys, or values, are coded.

    Attributes
    ----------
    reference : str
        "none", "page", "token" or "layer": what differences are taken from.
    along : str
        "channel" or "token": what has a scale and a zero of its own.
    """

    reference: str
    along: Along

    def fixed_bits(self, dim: int, bits: int) -> int:
        """Bits a page has, however many tokens are in it; less what its first token does not need."""
        fixed = 2 * _PARAMETER_BITS * dim if self.along == "channel" else 0
        if self.reference == "page":
            fixed += _PARAMETER_BITS * dim
        if self.reference == "token":
            # The first token stands there in float16, and has no codes.
            fixed += _PARAMETER_BITS * dim - self.token_bits(dim, bits)
        return fixed

    def token_bits(self, dim: int, bits: int) -> int:
        """Bits that each token adds."""
        return bits * dim + (2 * _PARAMETER_BITS if self.along == "token" else 0)


@dataclass(frozen=True)
class Scheme:
    """How keys and values are coded; with the reference "layer" both are, because they are expected together."""

    keys: Coding
    values: Coding

    @property
    def reference(self) -> str:
        """What differences are taken from."""
        return self.keys.reference

    @property
    def served(self) -> bool:
        """Whether this is what cold pages hold."""
        return self == SERVED


def _scheme(reference: str, keys: Along, values: Along) -> Scheme:
    return Scheme(Coding(reference, keys), Coding(reference, values))


SERVED: Final = _scheme("none", "channel", "token")
SCHEMES: Final = (
    SERVED,
    _scheme("none", "token", "token"),
    _scheme("none", "channel", "channel"),
    _scheme("none", "token", "channel"),
    _scheme("page", "token", "token"),
    _scheme("token", "channel", "token"),
    _scheme("token", "token", "token"),
    _scheme("layer", "channel", "token"),
    _scheme("layer", "token", "token"),
)
"""What is measured. A page's mean with a scale for each channel is left out: it is "none" with more bytes."""


@dataclass(frozen=True)
class Layout:
    """A scheme in pages.

    Attributes
    ----------
    scheme : Scheme
        How they are coded.
    bits : int
        Of a code.
    dim : int
        D, of a head.
    page_tokens : int
        Tokens of the page if nothing is coded.
    pairs : int
        Layers times kv heads, which share a token's position where the reference is "layer": there keys are coded
        before RoPE, and their positions are needed to read them.

    Raises
    ------
    CodecError
        No token fits.
    """

    scheme: Scheme
    bits: int
    dim: int
    page_tokens: int
    pairs: int = 1

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise CodecError(
                f"--page-tokens: got {self.page_tokens}, too few: a page of so many uncoded tokens of {self.dim} "
                f"dimensions has {self._page_bits // 8} bytes, and scales and codes of {_TOKEN_STEP} coded tokens do "
                "not fit; give more"
            )

    @property
    def capacity(self) -> int:
        """C, tokens of a page."""
        fixed = 8 * HEADER_BYTES + sum(part.fixed_bits(self.dim, self.bits) for part in self._parts)
        token = sum(part.token_bits(self.dim, self.bits) for part in self._parts) + self._position_bits
        return max(0, int((self._page_bits - fixed) // token) // _TOKEN_STEP * _TOKEN_STEP)

    @property
    def key_bits(self) -> float:
        """Bits of a key's element; header and what is left of the page are shared with the values."""
        return self._bits_of(self.scheme.keys)

    @property
    def value_bits(self) -> float:
        """The same of a value's."""
        return self._bits_of(self.scheme.values)

    @property
    def written(self) -> bool:
        """Whether `codec.cold_codec` writes these very pages."""
        return self.scheme.served and self.bits in SERVED_BITS

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self._page_bits // 8

    @property
    def _parts(self) -> tuple[Coding, Coding]:
        return self.scheme.keys, self.scheme.values

    @property
    def _page_bits(self) -> int:
        return self.page_tokens * 2 * self.dim * _MODEL_BYTES * 8

    @property
    def _position_bits(self) -> float:
        return _POSITION_BITS / self.pairs if self.scheme.reference == "layer" else 0.0

    def _used(self, part: Coding) -> float:
        return part.fixed_bits(self.dim, self.bits) + self.capacity * part.token_bits(self.dim, self.bits)

    def _bits_of(self, part: Coding) -> float:
        shared = self._page_bits - sum(self._used(each) for each in self._parts)
        return (self._used(part) + shared / 2) / (self.capacity * self.dim)


def layer_bits(reference: str, layer: int, bits: int) -> int:
    """Bits of a code in a layer."""
    return max(bits, FIRST_LAYER_BITS) if reference == "layer" and layer == 0 else bits
