# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How far an entry's value reaches: the length of what it adds to the residual stream, per unit of attention.

Attention says how much of a value is read, the output projection what becomes of it. A value that the projection makes
small costs little when it is gone, however much it was looked at: CriticalKV, arXiv 2502.03805, and KVzip+, arXiv
2601.07891, weight attention by this length, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deltamem_vllm.calibration.errors import CalibrationError

PROJECTIONS: Final = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""What transformers' models call the projection of attention's output."""

# A model's projections do not change, and a calibration reads many texts.
_GRAMS: WeakKeyDictionary[torch.nn.Module, Tensor] = WeakKeyDictionary()


@torch.inference_mode()
def reach_of(modules: Mapping[int, torch.nn.Module], values: Sequence[Tensor], entries: range) -> Tensor:
    """How far the value of each entry reaches, relative to its layer's mean.

    Of the query heads that share a kv head, the root mean square. Layers are made alike because the residual stream
    grows from layer to layer, and what counts is how much of it a layer's entries are.

    Parameters
    ----------
    modules : Mapping of int to Module
        The attention of each layer.
    values : Sequence of Tensor
        By layer, [kv heads, n, D_v].
    entries : range
        Which of the n.

    Returns
    -------
    Tensor
        [layers, kv heads, entries] float32 on the CPU, mean 1 in every layer (or all 1 where no value reaches at all).

    Raises
    ------
    CalibrationError
        A layer's attention has no output projection by any of the known names, or one of another width.
    """
    rows = []
    for layer, own in enumerate(values):
        part = own[:, entries.start : entries.stop].float()
        gram = _gram(modules[layer], own).to(part.device)
        lengths = ((part @ gram) * part).sum(-1).clamp(min=0).sqrt()
        mean = lengths.mean()
        rows.append((lengths / mean if mean > 0 else torch.ones_like(lengths)).cpu())
    return torch.stack(rows)


def _gram(module: torch.nn.Module, values: Tensor) -> Tensor:
    """[kv heads, D_v, D_v] float32: the mean of W'W over a kv head's query heads, W the projection of one of them."""
    kv_heads, _, dim = values.shape
    known = _GRAMS.get(module)
    if known is None:
        weight = _projection(module, kv_heads * dim, values)
        heads = weight.view(weight.shape[0], kv_heads, -1, dim).permute(1, 2, 0, 3)
        known = _GRAMS[module] = (heads.mT @ heads).mean(1)
    return known


def _projection(module: torch.nn.Module, width: int, like: Tensor) -> Tensor:
    """[hidden, H * D_v] float32: what the output projection of an attention does, whatever keeps its weights."""
    found = [getattr(module, name) for name in PROJECTIONS if isinstance(getattr(module, name, None), torch.nn.Module)]
    if len(found) != 1:
        names = ", ".join(name for name, _ in module.named_children()) or "none"
        raise CalibrationError(
            f"{type(module).__name__} has {len(found)} output projections by the names {', '.join(PROJECTIONS)}; "
            f"supported: attention with one (its parts are: {names})"
        )
    weight = _weight(found[0], like)
    if weight.shape[1] % width:
        raise CalibrationError(
            f"the output projection of {type(module).__name__} takes {weight.shape[1]} numbers; expected a multiple of "
            f"{width}, those of the values of a token"
        )
    return weight


def _weight(projection: torch.nn.Module, like: Tensor) -> Tensor:
    """[hidden, in] float32."""
    if type(projection) is torch.nn.Linear and not projection.weight.is_meta:
        return projection.weight.detach().float()
    # Quantised, kept the other way round, or loaded when it is used: what it makes of the unit vectors says the same.
    width = getattr(projection, "in_features", None) or cast(Tensor, projection.weight).shape[0]
    units = torch.eye(width, dtype=like.dtype, device=like.device)
    made: Tensor = projection(units) - projection(torch.zeros_like(units[:1]))
    return made.float().T
