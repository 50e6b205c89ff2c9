# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Finding the calibration of the model that vLLM serves, and this rank's part of it."""

from __future__ import annotations

from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from deltamem_vllm.calibration.artifact import Calibration, find
from deltamem_vllm.config import ConfigError, DeltaMemConfig
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.prior import HeadPrior


def find_calibration(vllm_config: Any, config: DeltaMemConfig) -> Calibration | None:
    """The calibration that the configuration asks for; None if there is none and none is needed.

    Raises
    ------
    ConfigError: `dealing` is ``profile``, which is nothing without one.
    CalibrationError: a named one is damaged or belongs to another model.
    """
    if config.dealing == "equal":
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
    return found


def rank_prior(calibration: Calibration, pool: PagePool) -> HeadPrior:
    """The head profile of the kv heads that this tensor-parallel rank serves.

    Raises
    ------
    ConfigError: the calibration is that of a model with other layers or heads.
    """
    table = calibration.rank_utility
    ranks = get_tensor_model_parallel_world_size()
    heads = kv_heads_of_rank(get_tensor_model_parallel_rank(), ranks, table.shape[1])
    if table.shape[0] != pool.layers or len(heads) != pool.heads:
        raise ConfigError(
            f"deltamem config: the calibration in {calibration.folder} is for {table.shape[0]} layers and "
            f"{table.shape[1]} kv heads, but each of {ranks} ranks caches {pool.layers} layers and {pool.heads} kv "
            "heads. Calibrate the model that is served, or set calibration to 'none'."
        )
    return HeadPrior(table[:, heads].to(pool.device))


def kv_heads_of_rank(rank: int, ranks: int, total: int) -> list[int]:
    """Which kv heads vLLM gives to a tensor-parallel rank; with more ranks than heads, several share one."""
    if total >= ranks:
        own = total // ranks
        return list(range(rank * own, (rank + 1) * own))
    return [rank // (ranks // total)]
