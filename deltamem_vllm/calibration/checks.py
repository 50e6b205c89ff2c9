# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Whether the tensors of a calibration are what they have to be."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import Geometry

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

AGAIN = "make a new one: deltamem calibrate"


def check_tensors(tensors: Mapping[str, Tensor], geometry: Geometry, where: str) -> None:
    """Raise `CalibrationError` for tensors that no server could use; `where` says whose they are."""
    import torch

    if "rank_utility" not in tensors:
        raise CalibrationError(f"{where} has no tensor rank_utility; {AGAIN}")
    profile = tensors["rank_utility"]
    expected = (geometry.layers, geometry.kv_heads)
    problem = ""
    if profile.dtype != torch.float32:
        problem = f"dtype {profile.dtype}, expected torch.float32"
    elif profile.dim() != 3 or tuple(profile.shape[:2]) != expected or profile.shape[2] < 1:
        problem = f"shape {tuple(profile.shape)}, expected ({expected[0]}, {expected[1]}, quantiles)"
    elif not bool(profile.isfinite().all()):
        problem = "entries that are not finite"
    elif bool((profile < 0).any()) or bool((profile.diff(dim=-1) > 0).any()):
        problem = "entries below zero or above the one before them"
    if problem:
        raise CalibrationError(f"rank_utility of {where} has {problem}; {AGAIN}")
    if "predictor" in tensors:
        _check_predictor(tensors["predictor"], geometry, where)


def _check_predictor(weights: Tensor, geometry: Geometry, where: str) -> None:
    import torch

    expected = (geometry.layers, geometry.kv_heads, _features(geometry))
    problem = ""
    if weights.dtype != torch.float32:
        problem = f"dtype {weights.dtype}, expected torch.float32"
    elif tuple(weights.shape) != expected:
        problem = f"shape {tuple(weights.shape)}, expected {expected}"
    elif not bool(weights.isfinite().all()):
        problem = "entries that are not finite"
    if problem:
        raise CalibrationError(f"predictor of {where} has {problem}; {AGAIN}")


def without_other_features(tensors: Mapping[str, Tensor], geometry: Geometry, where: str) -> dict[str, Tensor]:
    """The tensors without a predictor of a deltamem whose predictors had other features; the log says so.

    The rest of such a calibration is as good as ever.
    """
    predictor, expected = tensors.get("predictor"), _features(geometry)
    if predictor is None or predictor.dim() != 3 or predictor.shape[2] == expected:
        return dict(tensors)
    logger.warning(
        "the predictor of %s is not used: it has %d features, predictors of this deltamem have %d; %s",
        where,
        predictor.shape[2],
        expected,
        AGAIN,
    )
    return {name: tensor for name, tensor in tensors.items() if name != "predictor"}


def _features(geometry: Geometry) -> int:
    from deltamem_vllm.scoring.features import feature_widths

    return sum(feature_widths(geometry.head_dim, geometry.head_dim))
