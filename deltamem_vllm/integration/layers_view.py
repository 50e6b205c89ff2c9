# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What each (layer, kv head) of a request holds on one worker."""

from __future__ import annotations

import torch

from deltamem_vllm.dealing.tables import PageTables


def tokens_by_pair(
    tables: PageTables | None, shape: tuple[int, int], request_id: str, serial: int, resident: int
) -> dict[str, list[list[float]]]:
    """Tokens of each pair, by tier; waits for the device.

    Parameters
    ----------
    tables: of the worker; None where no pages are dealt.
    shape: layers and kv heads of this rank.
    request_id: of a running request.
    serial: of the compaction that dealt its pages; 0 if none did, and every pair then holds the same.
    resident: its nominal tokens.

    Returns
    -------
    ``hot`` and ``cold``, tables ``[layers][kv heads]``.

    Raises
    ------
    RuntimeError: the worker knows the pages of another compaction.
    """
    if serial == 0:
        return {"hot": _table(torch.full(shape, float(resident))), "cold": _table(torch.zeros(shape))}
    dealt = tables.requests.get(request_id) if tables is not None else None
    if tables is None or dealt is None or dealt.serial != serial:
        found = "none" if dealt is None else f"those of compaction {dealt.serial}"
        raise RuntimeError(
            f"request {request_id} was last dealt pages by compaction {serial}, but this worker knows {found}; the "
            "engine answers such questions between two steps only"
        )
    size = tables.pool.block_size
    hot = dealt.counts.cpu() * size + (resident - dealt.blocks * size)
    cold = torch.zeros(shape, dtype=torch.int64) if dealt.cold is None else dealt.cold.tokens.sum(2).cpu()
    return {"hot": _table(hot), "cold": _table(cold)}


def _table(tokens: torch.Tensor) -> list[list[float]]:
    table: list[list[float]] = tokens.double().tolist()
    return table
