# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A compaction as short JSON: the scheduler's facts, and run lengths of what stayed exact and what was coded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.packing import from_run_lengths, run_lengths
from deltamem_vllm.evaluation.profile.ragged import Ragged
from deltamem_vllm.evaluation.profile.recording import Coded, Compaction


def to_json(compaction: Compaction, lengths: NDArray[np.int64]) -> dict[str, Any]:
    """As plain values.

    Parameters
    ----------
    lengths
        [L, H_kv] exact tokens of each pair before it, see `held.lengths_before`.
    """
    survivors = [
        [run_lengths(head, int(lengths[number, i])) for i, head in enumerate(layer)]
        for number, layer in enumerate(compaction.survivors.layers())
    ]
    coded = None if compaction.coded is None else _coded_json(compaction.coded, lengths)
    return {**compaction.facts, "survivors": survivors, "coded": coded}


def from_json(data: Mapping[str, Any]) -> Compaction:
    """The inverse of `to_json`."""
    facts = {name: value for name, value in data.items() if name not in ("survivors", "coded")}
    survivors = Ragged.of([[from_run_lengths(head) for head in layer] for layer in data["survivors"]])
    return Compaction(facts, survivors, None if data["coded"] is None else _coded(data["coded"]))


def _coded_json(coded: Coded, lengths: NDArray[np.int64]) -> dict[str, Any]:
    pages = [
        [
            [
                run_lengths(page, int(lengths[layer, head]))
                for page in np.split(coded.tokens[layer, head], np.cumsum(sizes))[: len(sizes)]
            ]
            for head, sizes in enumerate(heads)
        ]
        for layer, heads in enumerate(coded.sizes.layers())
    ]
    return {"pages": pages, "stay": [[head.tolist() for head in layer] for layer in coded.stay.layers()]}


def _coded(data: Mapping[str, Any]) -> Coded:
    pages = [[[from_run_lengths(page) for page in head] for head in layer] for layer in data["pages"]]
    nothing = np.zeros(0, dtype=np.int32)
    return Coded(
        tokens=Ragged.of([[np.concatenate([nothing, *head]) for head in layer] for layer in pages]),
        sizes=Ragged.of([[[len(page) for page in head] for head in layer] for layer in pages]),
        stay=Ragged.of(data["stay"]),
    )
