# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What came out of a measurement of codecs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deltamem_vllm.calibration.fingerprint import Geometry


@dataclass(frozen=True)
class Controls:
    """Divergence of the continuation, nats a token: of the cache as it is, and of one with drawn codes."""

    exact: float
    random: float


@dataclass(frozen=True)
class Row:
    """One scheme with one number of bits.

    Attributes
    ----------
    page_tokens : int
        Tokens of the page if nothing is coded.
    reference, keys, values : str
        What differences are taken from; what has a scale of its own in keys and in values.
    bits : int
        Of a code.
    written : bool
        Whether cold pages are written this way: the row went through their bytes.
    capacity : int
        Tokens of a page.
    key_bits, value_bits : float
        Of an element, everything counted.
    key_error, value_error : float
        Mean |x - x'| / |x|, sinks left out.
    loss, loss_keys, loss_values : float
        Mean |o - o'| / |o| of attention's outputs with all but the sinks coded: keys and values, keys alone, values
        alone.
    loss_by_layer : list of float
        The first of them.
    kl : float
        Divergence of the continuation, nats a token, with exact sinks.
    kl_by_text : list of float
        The same, of each text.
    kl_coded_sinks : float
        The same with the sinks coded, too.
    """

    page_tokens: int
    reference: str
    keys: str
    values: str
    bits: int
    written: bool
    capacity: int
    key_bits: float
    value_bits: float
    key_error: float
    value_error: float
    loss: float
    loss_keys: float
    loss_values: float
    loss_by_layer: list[float]
    kl: float
    kl_by_text: list[float]
    kl_coded_sinks: float

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{self.reference}, keys per {self.keys}, values per {self.values}, {self.bits} bits"

    @property
    def element_bits(self) -> float:
        """Of an element of keys and values together."""
        return (self.key_bits + self.value_bits) / 2


@dataclass(frozen=True)
class Measured:
    """All of it.

    Attributes
    ----------
    model : str
        As it was named.
    settings : dict
        Of `Settings`.
    geometry : Geometry
        Of the model.
    controls : Controls
        What must come out when nothing is coded, and when nothing is left.
    rows : list of Row
        By page size, scheme and bits.
    details : dict
        Machine, code, dtype, duration.
    """

    model: str
    settings: dict[str, Any]
    geometry: Geometry
    controls: Controls
    rows: list[Row]
    details: dict[str, Any]

    @property
    def map_multiplications(self) -> int:
        """Multiply-adds of one map: all kv heads' keys and values of a token and layer, to as many."""
        return (self.geometry.kv_heads * 2 * self.geometry.head_dim) ** 2

    @property
    def attention_multiplications(self) -> int:
        """Multiply-adds with which one query's heads read a token of a layer: a key and a value each."""
        return self.geometry.query_heads * 2 * self.geometry.head_dim

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "cost": {
                "map_multiply_adds_per_token_and_layer": self.map_multiplications,
                "attention_multiply_adds_per_token_and_layer": self.attention_multiplications,
            },
        }
