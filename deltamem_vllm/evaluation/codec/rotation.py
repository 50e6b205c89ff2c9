# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Rotary positions, applied and undone: what one layer says about the next is said about keys before RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from deltamem_vllm.evaluation.codec.errors import CodecError

_TOLERANCE: Final = 1e-3


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of the positions 0 to n - 1, in the form of Llama: the halves of a key are turned together.

    Attributes
    ----------
    cos, sin : Tensor
        ``[n, R]`` float32; the first R of D dimensions are turned. R is 0 for models without RoPE.
    """

    cos: Tensor
    sin: Tensor

    def apply(self, keys: Tensor, first: int = 0) -> Tensor:
        """Turn ``[..., m, D]`` keys of the positions from `first` on."""
        return self._turned(keys, first, 1.0)

    def undo(self, keys: Tensor, first: int = 0) -> Tensor:
        """The reverse of `apply`."""
        return self._turned(keys, first, -1.0)

    def _turned(self, keys: Tensor, first: int, direction: float) -> Tensor:
        size = self.cos.shape[1]
        if not size:
            return keys
        part = slice(first, first + keys.shape[-2])
        cos, sin = self.cos[part], direction * self.sin[part]
        if direction < 0:
            # Some models scale with the rotation.
            scale = (cos.square() + sin.square()).clamp(min=1e-12)
            cos, sin = cos / scale, sin / scale
        turned, rest = keys[..., :size], keys[..., size:]
        left, right = turned.chunk(2, -1)
        return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, rest], -1)


def rotation_of(model: Any, positions: int) -> Rotation:
    """The rotation of a model of transformers; none if it has no rotary embedding."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return Rotation(torch.empty(positions, 0), torch.empty(positions, 0))
    like = torch.empty(1, dtype=torch.float32, device=model.device)
    try:
        cos, sin = rotary(like, torch.arange(positions, device=model.device).unsqueeze(0))
    except (TypeError, ValueError, RuntimeError) as error:
        raise CodecError(f"{_problem(model)}: {error}; {_WITHOUT}") from error
    return Rotation(cos[0].float().cpu(), sin[0].float().cpu())


def check_rotation(model: Any, rotation: Rotation, keys: Tensor, tokens: list[int]) -> None:
    """See that undoing leaves nothing of the position: in layer 0, equal tokens have equal keys before RoPE.

    Parameters
    ----------
    model
        For the message.
    rotation : Rotation
        Of the model.
    keys : Tensor
        ``[H, n, D]`` float32, of layer 0.
    tokens : list of int
        Their n ids.

    Raises
    ------
    CodecError
        Some differ: the model turns its keys in another way.
    """
    plain = rotation.undo(keys)
    first = {token: place for place, token in reversed(list(enumerate(tokens)))}
    same = [first[token] for token in tokens]
    worst = float((plain - plain[:, same]).abs().max() / plain.abs().max())
    if worst > _TOLERANCE:
        raise CodecError(f"{_problem(model)} (equal tokens differ by {worst:.1e}); {_WITHOUT}")


_WITHOUT = "give --references none,page,token to measure the others"


def _problem(model: Any) -> str:
    return f"the rotary positions of {type(model).__name__} are not understood, which the reference 'layer' needs"
