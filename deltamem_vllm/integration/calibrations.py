# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Finding the calibration of the model that vLLM serves, and this rank's part of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from deltamem_vllm.calibration.artifact import Calibration, find
from deltamem_vllm.config import AUTO, ConfigError, DeltaMemConfig
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.prior import HeadPrior
from deltamem_vllm.scoring.base import Scorer
from deltamem_vllm.scoring.registry import available_scorers


def find_calibration(vllm_config: Any, config: DeltaMemConfig) -> Calibration | None:
    """The calibration that the configuration asks for; None if there is none and none is needed.

    Raises
    ------
    ConfigError: `dealing` is ``profile``, which is nothing without one, or a scorer needs what it does not have.
    CalibrationError: a named one is damaged or belongs to another model.
    """
    known = available_scorers()
    learning = [known[name] for name in config.scorers if name != AUTO and known[name].learned is not None]
    if config.dealing == "equal" and not learning:
        return None
    model = vllm_config.model_config
    found = find(
        config.calibration,
        model.model,
        revision=model.revision,
        download_dir=vllm_config.load_config.download_dir,
    )
    if found is None and config.dealing == "profile":
        raise ConfigError(
            "deltamem config: dealing='profile' shares memory out by a calibration, and there is none for "
            f"{model.model}. Make one with `deltamem calibrate {model.model}`, or set dealing to 'global' or 'equal'."
        )
    for scorer in learning:
        if found is None or scorer.learned not in found.tensors:
            lacking = f"there is none for {model.model}" if found is None else f"the one in {found.folder} lacks it"
            others = ", ".join(sorted(name for name, other in known.items() if other.learned is None))
            raise ConfigError(
                f"deltamem config: scorer {scorer.name!r} needs {scorer.learned!r} of a calibration, and with "
                f"calibration={config.calibration!r} {lacking}. Make one with `deltamem calibrate {model.model}`, let "
                f"calibration find it ('auto' or its path), or use other scorers: 'auto', {others}."
            )
    return found


def rank_prior(calibration: Calibration, pool: PagePool) -> HeadPrior:
    """The head profile of the kv heads that this tensor-parallel rank serves.

    Raises
    ------
    ConfigError: the calibration is that of a model with other layers or heads.
    """
    return HeadPrior(_rank_part(calibration, calibration.rank_utility, pool.layers, pool.heads).to(pool.device))


def bind_scorers(
    calibration: Calibration | None, scorers: Iterable[Scorer], layers: int, heads: int, device: torch.device
) -> None:
    """Give scorers that learn from the calibration the part that is of this rank's kv heads.

    Parameters
    ----------
    calibration: as of `find_calibration`.
    scorers: of this worker.
    layers, heads: that this rank caches.
    device: of the cache.

    Raises
    ------
    ConfigError: the calibration is that of a model with other layers or heads.
    """
    for scorer in scorers:
        if scorer.learned is not None:
            assert calibration is not None, "find_calibration refuses to do without one"
            part = _rank_part(calibration, calibration.tensors[scorer.learned], layers, heads)
            scorer.bind(part.to(device))


def _rank_part(calibration: Calibration, table: Tensor, layers: int, own_heads: int) -> Tensor:
    """Of ``[layers, kv heads, ...]`` the kv heads of this tensor-parallel rank."""
    ranks = get_tensor_model_parallel_world_size()
    heads = kv_heads_of_rank(get_tensor_model_parallel_rank(), ranks, table.shape[1])
    if table.shape[0] != layers or len(heads) != own_heads:
        raise ConfigError(
            f"deltamem config: the calibration in {calibration.folder} is for {table.shape[0]} layers and "
            f"{table.shape[1]} kv heads, but each of {ranks} ranks caches {layers} layers and {own_heads} kv "
            "heads. Calibrate the model that is served, or set calibration to 'none'."
        )
    return table[:, heads]


def kv_heads_of_rank(rank: int, ranks: int, total: int) -> list[int]:
    """Which kv heads vLLM gives to a tensor-parallel rank; with more ranks than heads, several share one."""
    if total >= ranks:
        own = total // ranks
        return list(range(rank * own, (rank + 1) * own))
    return [rank // (ranks // total)]
