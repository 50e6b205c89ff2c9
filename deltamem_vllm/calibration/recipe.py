# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the predictor is fitted with: the features, the scale of the target, and the ridge. The one place to change."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deltamem_vllm.scoring.features import feature_parts


@dataclass(frozen=True)
class Recipe:
    """How entries are described and what is fitted to them.

    Attributes
    ----------
    features : Callable
        Keys [kv heads, n, D] and values [kv heads, n, D_v] of all entries to parts of the features, each [kv heads, n,
        width]; the same that the scorer uses.
    reach : bool
        Whether attention counts by how far the value reaches that it reads (`reach.reach_of`).
    log_floor : float
        Added to what an entry is worth before the logarithm: what is worth far less was not looked at, and how much
        less says nothing.
    ridge : float
        Of the mean diagonal of X'X, added to the diagonal.
    """

    features: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = feature_parts
    reach: bool = True
    log_floor: float = 1e-3
    ridge: float = 1e-4

    def identity(self) -> dict[str, str | float | bool]:
        """JSON values by which another recipe can be told from this one; other features have another source text."""
        module = inspect.getmodule(self.features)
        source = inspect.getsource(module if module is not None else self.features)
        return {
            "features": f"{self.features.__module__}.{self.features.__qualname__}",
            "features_sha256": hashlib.sha256(source.encode()).hexdigest(),
            "reach": self.reach,
            "log_floor": self.log_floor,
            "ridge": self.ridge,
        }


RECIPE = Recipe()
"""What `deltamem calibrate` uses."""
