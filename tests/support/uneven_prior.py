# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A calibration that nobody measured: heads that deserve very different amounts of memory."""

from __future__ import annotations

from pathlib import Path

import torch

from deltamem_vllm.calibration.artifact import Calibration, Card, save
from deltamem_vllm.calibration.fingerprint import fingerprint, geometry_of, read_config

QUANTILES = 128


def write_calibration(model: Path, folder: Path) -> Path:
    """Write one for the checkpoint ``model`` to ``folder``, which must be new; returns ``folder``.

    Pair p of the model falls off with its own power of the rank, from almost flat to steep, from its own level.
    """
    geometry = geometry_of(read_config(model))
    pairs = torch.arange(geometry.layers * geometry.kv_heads).view(geometry.layers, geometry.kv_heads, 1)
    rank = (torch.arange(QUANTILES) + 0.5) / QUANTILES
    utility = (1.0 + pairs % 5) * rank ** (-0.2 * (pairs % 4))
    save(Calibration(Card(str(model), fingerprint(model), geometry), {"rank_utility": utility.float()}), folder)
    return folder
