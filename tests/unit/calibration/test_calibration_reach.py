# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""How far values reach: against the output projection itself, in every form that it comes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module

from deltamem_vllm.calibration.attention import NAME, Recorder
from deltamem_vllm.calibration.corpus import token_sample
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.prompt import prompt_of
from deltamem_vllm.calibration.reach import reach_of
from deltamem_vllm.calibration.recipe import Recipe
from deltamem_vllm.calibration.targets import observe
from tests.support.tiny_models import FAMILIES, KV_HEADS, LAYERS

Tiny = Callable[[str], Path]

HEADS, DIM, COUNT = 2, 4, 30


def by_projecting(project: Callable[[Tensor], Tensor], values: Tensor, heads: int, entries: range) -> Tensor:
    """Each value alone through the projection, in the place of each query head that reads it; one layer."""
    kv_heads, _, dim = values.shape
    lengths = torch.zeros(kv_heads, len(entries))
    group = heads // kv_heads
    nothing = project(torch.zeros(1, heads * dim))
    for kv in range(kv_heads):
        for place, entry in enumerate(entries):
            added = []
            for head in range(kv * group, (kv + 1) * group):
                read = torch.zeros(1, heads * dim)
                read[0, head * dim : (head + 1) * dim] = values[kv, entry]
                added.append((project(read) - nothing).square().sum())
            lengths[kv, place] = torch.stack(added).mean().sqrt()
    return lengths / lengths.mean()


class Attention(Module):
    def __init__(self, **parts: Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Backwards(Module):
    """A projection that keeps its weight the other way round, and scaled: nothing can be read off it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(width, hidden))

    def forward(self, read: Tensor) -> Tensor:
        return 3.0 * (read @ self.weight) + 1.0


def offloaded(width: int, hidden: int) -> Linear:
    """A projection whose weight is elsewhere until it is used."""
    weight = torch.randn(hidden, width)
    projection = Linear(width, hidden, device="meta")
    projection.forward = lambda read: read @ weight.T  # type: ignore[method-assign]
    return projection


def values_of(layers: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(layers)
    return list(torch.randn(layers, HEADS, COUNT, DIM, generator=generator))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_value_reaches_as_far_as_the_models_own_projection_takes_it(tiny: Tiny, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny(family)
    recorder = Recorder()
    recorder.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME).eval()
    sample = token_sample(tokenizer, "novel", 0, 40)
    seen = observe(model, tokenizer, recorder, prompt_of(tokenizer), sample, "answers")
    assert seen.reach.shape == (LAYERS, KV_HEADS, len(seen.watched))
    heads = model.config.num_attention_heads
    for layer in range(LAYERS):
        project = model.model.layers[layer].self_attn.o_proj
        with torch.inference_mode():
            expected = by_projecting(project, seen.values[layer], heads, seen.watched)
        torch.testing.assert_close(seen.reach[layer], expected, atol=1e-5, rtol=1e-4)
    # Control: not what the lengths of the values are.
    plain = torch.stack([own[:, seen.watched.start :].norm(dim=-1) for own in seen.values])
    assert not torch.allclose(seen.reach, plain / plain.mean((1, 2), keepdim=True), rtol=0.05)
    torch.testing.assert_close(seen.entries("answers").worth, seen.peaks["answers"] * seen.reach)
    assert torch.equal(seen.entries("answers", Recipe(reach=False)).worth, seen.peaks["answers"])


@pytest.mark.parametrize("name", ["o_proj", "out_proj", "dense", "c_proj", "wo"])
@pytest.mark.parametrize("form", [Linear, Backwards, offloaded])
def test_every_form_of_projection_counts(name: str, form: Callable[[int, int], Module]) -> None:
    torch.manual_seed(0)
    query_heads, entries = 3 * HEADS, range(4, COUNT)
    modules = {layer: Attention(**{name: form(query_heads * DIM, 20), "q_proj": Linear(20, 24)}) for layer in range(3)}
    values = values_of(3)
    reach = reach_of(modules, values, entries)
    for layer, own in enumerate(values):
        with torch.inference_mode():
            expected = by_projecting(getattr(modules[layer], name), own, query_heads, entries)
        torch.testing.assert_close(reach[layer], expected, atol=1e-5, rtol=1e-4)


def test_layers_are_alike_and_a_layer_that_adds_nothing_is_not_divided_by() -> None:
    torch.manual_seed(0)
    modules = {layer: Attention(o_proj=Linear(HEADS * DIM, 20)) for layer in range(2)}
    values = values_of(2)
    values[1] = torch.zeros_like(values[1])
    reach = reach_of(modules, values, range(COUNT))
    torch.testing.assert_close(reach.mean((1, 2)), torch.ones(2))
    assert torch.equal(reach[1], torch.ones(HEADS, COUNT))
    larger = reach_of(modules, [1000.0 * own for own in values], range(COUNT))
    torch.testing.assert_close(larger, reach)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Attention(proj=Linear(8, 8)), "Attention has 0 output projections by the names o_proj.*its parts are: proj"),
        (Attention(), "its parts are: none"),
        (Attention(o_proj=Linear(8, 8), dense=Linear(8, 8)), "has 2 output projections"),
        (Attention(o_proj=Linear(12, 8)), "takes 12 numbers; expected a multiple of 8"),
    ],
)
def test_attention_without_one_projection_is_refused(module: Module, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        reach_of({0: module}, values_of(1), range(COUNT))
