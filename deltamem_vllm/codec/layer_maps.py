# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The delta from the previous layer: an affine map says what a token's next layer will hold, the rest is coded.

The map of a layer reads what decodes from the layer before (closed loop), so that errors do not add up from layer to
layer: what is wrong with the base is part of the next difference. Maps are fitted in the same loop, on what they will
read. A layer is a row of F numbers a token: all its kv heads' keys and values beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

RIDGE: Final = 1e-2
"""Penalty of a weight, as a share of the variance of what it multiplies. From 1e-4 to 1e-1 errors are alike; with less,
maps fitted on few texts run away at 2 bits."""

Code = Callable[[int, Tensor], Tensor]
"""A layer's number and what is to be coded of it, ``[n, F]``; returns what decodes from it, of the same shape."""


@dataclass(frozen=True)
class LayerMaps:
    """Affine maps from each layer to the next.

    Attributes
    ----------
    weights : Tensor
        ``[L - 1, F, F]`` float32: row vectors times entry l give layer l + 1.
    biases : Tensor
        ``[L - 1, F]`` float32.
    """

    weights: Tensor
    biases: Tensor

    def predict(self, layer: int, before: Tensor) -> Tensor:
        """What a layer is expected to hold (``[n, F]``), given the layer before it, 1 <= layer < L."""
        if not 1 <= layer <= len(self.weights):
            raise ValueError(f"there are maps to layers 1 to {len(self.weights)}, got layer {layer}")
        return torch.addmm(self.biases[layer - 1], before, self.weights[layer - 1])

    @property
    def parameters(self) -> int:
        """Numbers in all maps."""
        return self.weights.numel() + self.biases.numel()


def code_by_layers(maps: LayerMaps, layers: Tensor, code: Code) -> Tensor:
    """What decodes from the differences between each layer and what is expected of it; layer 0 is coded itself.

    Parameters
    ----------
    maps : LayerMaps
        Of the model.
    layers : Tensor
        ``[L, n, F]`` float32.
    code : Callable
        Codes and decodes one layer's difference.

    Returns
    -------
    Tensor
        ``[L, n, F]`` float32.

    Raises
    ------
    ValueError
        The maps are of another number of layers or of other sizes.
    """
    expected = (len(maps.weights) + 1, maps.weights.shape[1])
    if (layers.shape[0], layers.shape[2]) != expected:
        raise ValueError(f"maps of {expected[0]} layers of {expected[1]} numbers a token, got {tuple(layers.shape)}")
    decoded = [code(0, layers[0])]
    for layer in range(1, len(layers)):
        base = maps.predict(layer, decoded[-1])
        decoded.append(base + code(layer, layers[layer] - base))
    return torch.stack(decoded)


def fit_layer_maps(texts: Sequence[Tensor], code: Code, ridge: float = RIDGE) -> LayerMaps:
    """Fit the maps on texts, each on what decodes from the layer before.

    Parameters
    ----------
    texts : sequence of Tensor
        Of each text ``[L, n, F]`` float32; n may differ.
    code : Callable
        The codec that the maps will be used with.
    ridge : float
        See `RIDGE`.

    Raises
    ------
    ValueError
        There is no text, texts differ in L or F, or there are fewer than two tokens or two layers.
    """
    sizes = {(text.shape[0], text.shape[2]) for text in texts}
    if len(sizes) != 1 or sum(text.shape[1] for text in texts) < 2 or next(iter(sizes))[0] < 2:
        raise ValueError(
            f"maps are fitted on texts [L, n, F] of one L >= 2 and F and two tokens or more, got "
            f"{[tuple(text.shape) for text in texts]}"
        )
    weights, biases = [], []
    decoded = [code(0, text[0]) for text in texts]
    for layer in range(1, len(texts[0])):
        weight, bias = fit_affine(torch.cat(decoded), torch.cat([text[layer] for text in texts]), ridge)
        weights.append(weight)
        biases.append(bias)
        for i, text in enumerate(texts):
            base = torch.addmm(bias, decoded[i], weight)
            decoded[i] = base + code(layer, text[layer] - base)
    return LayerMaps(torch.stack(weights), torch.stack(biases))


def fit_affine(given: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The weight ``[F, G]`` and bias ``[G]`` with which ``given [n, F]`` best gives ``wanted [n, G]``.

    Least squares with a penalty on the weights, solved in float64.
    """
    x, y = given.double(), wanted.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    moments = x.T @ x
    spread = moments.diagonal()
    # What never changes gets a penalty, too: without one the moments have no inverse.
    penalty = ridge * spread.clamp(min=float(spread.mean()) * 1e-6 + 1e-30)
    weight = torch.linalg.solve(moments + penalty.diag(), x.T @ y)
    return weight.to(given.dtype), (y_mean - x_mean @ weight).to(given.dtype)
