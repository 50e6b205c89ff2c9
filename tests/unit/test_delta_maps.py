# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Codecs that are measured: rounding as cold pages round, differences inside a page, maps from layer to layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltamem_vllm.codec.cold_codec import decode_pages, encode_pages
from deltamem_vllm.codec.cold_page import BITS, ColdFormat
from deltamem_vllm.codec.layer_maps import Code, LayerMaps, code_by_layers, fit_affine, fit_layer_maps
from deltamem_vllm.codec.references import from_page_mean, from_previous_token
from deltamem_vllm.codec.rounding import Along, rounded

Coder = Callable[[Tensor, Tensor, Along, int], Tensor]
LAYERS, TOKENS, FEATURES = 12, 600, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everywhere(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def linear_layers(noise: float, seed: int = 1) -> tuple[Tensor, LayerMaps]:
    """Layers of which each is an affine map of the one before, and noise; and the maps."""
    weights = torch.linalg.qr(normal(LAYERS - 1, FEATURES, FEATURES, seed=2))[0]
    maps = LayerMaps(weights, normal(LAYERS - 1, FEATURES, seed=3))
    layers = [normal(TOKENS, FEATURES, seed=seed)]
    for layer in range(1, LAYERS):
        layers.append(maps.predict(layer, layers[-1]) + noise * normal(TOKENS, FEATURES, seed=100 * seed + layer))
    return torch.stack(layers), maps


def rounding_code(bits: int, along: Along) -> Code:
    def code(layer: int, rows: Tensor) -> Tensor:
        del layer
        return rounded(rows.unsqueeze(0), everywhere(rows.unsqueeze(0)), along, bits)[0]

    return code


def exact_code(layer: int, rows: Tensor) -> Tensor:
    del layer
    return rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 80])
def test_rounding_is_that_of_cold_pages(bits: int, dim: int) -> None:
    served = ColdFormat(bits, dim, 32 * 2 * dim * 2)
    counts = torch.tensor([served.capacity, 1, served.capacity // 2])
    keys, values = (5 * normal(3, served.capacity, dim, seed=seed) + seed for seed in (4, 5))
    keys[0, :, 3] = 0.125  # a channel without a range
    keys[2, 0, 5] = 3e5  # beyond float16
    decoded_keys, decoded_values, _ = decode_pages(served, encode_pages(served, keys, values, counts))
    there = torch.arange(served.capacity) < counts.unsqueeze(1)
    assert torch.equal(rounded(keys, there, "channel", bits), decoded_keys)
    assert torch.equal(rounded(values, there, "token", bits), decoded_values)


@pytest.mark.parametrize("along", ["channel", "token"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_off_by_half_a_step_at_most(along: Along, bits: int) -> None:
    tokens = normal(4, 50, 16)
    over = 1 if along == "channel" else 2
    step = (tokens.amax(over, keepdim=True) - tokens.amin(over, keepdim=True)) / (2**bits - 1)
    error = (rounded(tokens, everywhere(tokens), along, bits) - tokens).abs()
    # Scale and zero are rounded to float16, 11 bits: of the range, which is that of about +-4 here.
    assert (error <= step / 2 + 8 * 2**-11).all()
    assert error.max() > step.min() / 4


def test_drawn_codes_keep_the_ranges_only() -> None:
    tokens = normal(4, 50, 16)
    drawn = rounded(tokens, everywhere(tokens), "channel", 4, torch.Generator().manual_seed(0))
    assert (drawn.amax(1) <= tokens.amax(1) + 0.01).all() and (drawn.amin(1) >= tokens.amin(1) - 0.01).all()
    assert ((drawn - tokens).norm() / tokens.norm()) > 1


@pytest.mark.parametrize("coder", [from_page_mean, from_previous_token])
@pytest.mark.parametrize("along", ["channel", "token"])
def test_more_bits_less_error_and_absent_tokens_do_not_count(coder: Coder, along: Along) -> None:
    tokens, there = normal(3, 40, 16) + 3, torch.arange(40) < torch.tensor([[40], [1], [17]])
    spoilt = torch.where(there.unsqueeze(2), tokens, 1e4)
    errors = []
    for bits in (2, 4, 8):
        decoded = coder(tokens, there, along, bits)
        assert torch.equal(decoded, coder(spoilt, there, along, bits))
        assert (decoded[~there] == 0).all()
        errors.append(float((decoded - tokens)[there].norm() / tokens[there].norm()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    # What float16 and 8 bits of a range of about 8 leave of numbers about 3.
    assert errors[2] < 0.01


def test_page_mean_takes_what_tokens_share() -> None:
    tokens = 0.1 * normal(2, 30, 16) + 20 * normal(2, 1, 16, seed=7)
    plain, delta = (coder(tokens, everywhere(tokens), "token", 3) - tokens for coder in (rounded, from_page_mean))
    assert delta.norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("along", ["channel", "token"])
def test_previous_token_does_not_add_errors_up(along: Along) -> None:
    # A walk: its steps are small, its range is not, so only a closed loop stays near it.
    tokens = normal(2, 400, 16).cumsum(1)
    error = (from_previous_token(tokens, everywhere(tokens), along, 4) - tokens).norm(dim=-1)
    assert error[:, 300:].mean() < 1.5 * error[:, 50:150].mean()
    assert error.mean() < 0.2 * rounded(tokens, everywhere(tokens), "channel", 4).sub(tokens).norm(dim=-1).mean()


def test_affine_map_is_recovered() -> None:
    given, weight, bias = normal(500, 6), normal(6, 4, seed=1), normal(4, seed=2)
    given[:, 2] *= 1e-3  # the penalty is relative to the spread, so that a small feature counts as well
    given[:, 4] = 7.0  # never changes: its weight cannot be told from the bias, and must not break the fit
    found, found_bias = fit_affine(given, given @ weight + bias, 1e-8)
    torch.testing.assert_close(given @ found + found_bias, given @ weight + bias, atol=1e-4, rtol=1e-4)
    free = [0, 1, 2, 3, 5]
    torch.testing.assert_close(found[free], weight[free], atol=1e-3, rtol=1e-3)


def test_ridge_shrinks() -> None:
    given = normal(500, 6)
    wanted = given @ normal(6, 4, seed=1)
    assert fit_affine(given, wanted, 10.0)[0].norm() < 0.2 * fit_affine(given, wanted, 0.0)[0].norm()


def test_maps_are_recovered_from_linear_layers() -> None:
    layers, maps = linear_layers(noise=0.0)
    found = fit_layer_maps([layers[:, :250], layers[:, 250:]], exact_code, 1e-9)
    torch.testing.assert_close(found.weights, maps.weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.biases, maps.biases, atol=1e-4, rtol=0)
    assert found.parameters == (LAYERS - 1) * FEATURES * (FEATURES + 1)


@pytest.mark.parametrize("along", ["channel", "token"])
def test_closed_loop_does_not_add_errors_up(along: Along) -> None:
    fitted, _ = linear_layers(noise=0.1, seed=1)
    layers, _ = linear_layers(noise=0.1, seed=2)
    code = rounding_code(4, along)
    maps = fit_layer_maps([fitted], code)
    closed = (code_by_layers(maps, layers, code) - layers).norm(dim=(1, 2))
    # What is coded is noise after layer 0, and errors depend on its range alone: no layer is worse than an early one.
    assert (closed[2:] < 1.2 * closed[2]).all()
    # The same differences between exact layers, added up: errors come on top of one another.
    added = [code(0, layers[0])]
    for layer in range(1, LAYERS):
        difference = layers[layer] - maps.predict(layer, layers[layer - 1])
        added.append(maps.predict(layer, added[-1]) + code(layer, difference))
    opened = (torch.stack(added) - layers).norm(dim=(1, 2))
    assert opened[-1] > 2 * closed[-1]
    # And it is worth it: the layers themselves have ten times the range of the noise.
    direct = torch.stack([code(layer, layers[layer]) for layer in range(LAYERS)]) - layers
    assert closed[1:].mean() < 0.4 * direct.norm(dim=(1, 2))[1:].mean()


def test_maps_refuse_what_does_not_fit() -> None:
    layers, maps = linear_layers(noise=0.1)
    with pytest.raises(ValueError, match=r"maps of 12 layers of 8 numbers a token, got \(11, 600, 8\)"):
        code_by_layers(maps, layers[1:], exact_code)
    with pytest.raises(ValueError, match="maps to layers 1 to 11, got layer 0"):
        maps.predict(0, layers[0])
    for texts in ([], [layers[:1]], [layers[:, :1]], [layers, layers[:3]]):
        with pytest.raises(ValueError, match="one L >= 2 and F and two tokens or more"):
            fit_layer_maps(texts, exact_code)
