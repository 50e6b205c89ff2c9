# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which tokens of the prompt each (layer, kv head) holds after each compaction, exactly and coded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.ragged import Ragged
from deltamem_vllm.evaluation.profile.recording import Coded, Compaction


@dataclass(frozen=True)
class Held:
    """What one compaction left.

    Parameters
    ----------
    exact
        Of each (layer, kv head), logical positions of the tokens in its hot pages, ascending.
    coded
        Of each, those of the tokens in its cold pages, one page after the other, ascending within each.
    sizes
        Of each, the tokens of each of its cold pages.
    """

    exact: Ragged
    coded: Ragged
    sizes: Ragged


def lengths_before(compactions: Sequence[Compaction], block_tokens: int) -> list[NDArray[np.int64]]:
    """Exact tokens of each (layer, kv head) when each compaction began, [L, H_kv].

    Between two compactions every head gains the same new tokens, and cold pages stay as they are.

    Parameters
    ----------
    block_tokens
        Exact tokens of a page: a cold one takes the place of so many.

    Raises
    ------
    ValueError
        They do not average to what the scheduler counted.
    """
    found: list[NDArray[np.int64]] = []
    for number, compaction in enumerate(compactions):
        logical, cold = int(compaction.facts["logical_len"]), 0
        if number:
            before = compactions[number - 1]
            lengths = before.survivors.counts + (logical - int(before.facts["logical_len"]))
            cold = 0 if before.coded is None else int(before.coded.pages.sum())
        else:
            lengths = np.full_like(compaction.survivors.counts, logical)
        nominal = int(lengths.sum()) + cold * block_tokens
        if nominal != lengths.size * compaction.facts["resident_before"]:
            raise ValueError(
                f"compaction {number} started from {compaction.facts['resident_before']} resident tokens, but "
                f"{nominal / lengths.size:g} follow from those before it"
            )
        found.append(lengths)
    return found


def held_after(compactions: Sequence[Compaction], block_tokens: int) -> list[Held]:
    """What each compaction left, as logical positions.

    Parameters
    ----------
    block_tokens
        As of `lengths_before`.

    Raises
    ------
    ValueError
        Tokens or cold pages that cannot follow from what the compaction before left.
    """
    lengths_before(compactions, block_tokens)
    found: list[Held] = []
    for number, compaction in enumerate(compactions):
        logical = int(compaction.facts["logical_len"])
        nothing = Ragged(np.zeros(0, dtype=np.int32), np.zeros_like(compaction.survivors.counts))
        before = found[-1] if found else Held(nothing, nothing, nothing)
        since = int(compactions[number - 1].facts["logical_len"]) if number else 0
        resident = before.exact.followed_by(since, logical)
        coded, sizes = nothing, nothing
        if compaction.coded is not None:
            coded, sizes = _cold_pages(resident.of_these(compaction.coded.tokens), compaction.coded, before)
        found.append(Held(resident.of_these(compaction.survivors), coded, sizes))
    return found


def _cold_pages(new: Ragged, coded: Coded, before: Held) -> tuple[Ragged, Ragged]:
    """Positions in each pair's cold pages, its new ones first, and the sizes of these pages."""
    layers, heads = new.counts.shape
    positions: list[list[NDArray[np.int32]]] = []
    sizes: list[list[NDArray[np.int32]]] = []
    for layer in range(layers):
        positions.append([])
        sizes.append([])
        for head in range(heads):
            at = (layer, head)
            stay, old = coded.stay[at], before.sizes[at]
            if (stay >= len(old)).any() or (stay < 0).any():
                raise ValueError("a cold page stays that its head did not have")
            pages = np.split(before.coded[at], np.cumsum(old))
            positions[-1].append(np.concatenate([new[at], *(pages[page] for page in stay)]))
            sizes[-1].append(np.concatenate([coded.sizes[at], old[stay]]))
    return Ragged.of(positions), Ragged.of(sizes)
