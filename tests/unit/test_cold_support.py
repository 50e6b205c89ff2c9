# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Where pages can be cold, what `cold_bits: auto` comes to, and which attention our kernel serves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from deltamem_vllm.codec.cold_page import LOSS, ColdFormat
from deltamem_vllm.config import ConfigError, DeltaMemConfig
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.integration import paged_attention
from deltamem_vllm.integration.paged_attention import cold_tier, install_kernel
from deltamem_vllm.ops import native
from deltamem_vllm.ops.inputs import make_layout
from deltamem_vllm.plugin import register

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}
BLOCK, DIM = 32, 16
COLD = ColdFormat(4, DIM, BLOCK * 2 * DIM * 4)


def resolved_bits(folder: Path, policy: dict[str, Any], **model: Any) -> int:
    register()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **model}))
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, additional_config={"deltamem": policy}
    )
    config = arguments.create_engine_config().additional_config
    assert isinstance(config, dict)
    bits: int = config["deltamem"]["cold_bits"]
    return bits


@pytest.mark.parametrize(
    ("policy", "model", "bits"),
    [
        ({}, {}, 4),
        ({"cold_bits": 2}, {}, 2),
        ({"cold_bits": 0}, {}, 0),
        ({"dealing": "equal"}, {}, 0),
        ({}, {"head_dim": 24}, 0),
        ({}, {"attn_logit_softcapping": 30.0}, 0),
    ],
)
def test_auto_is_four_bits_where_they_can_be_read(
    tmp_path: Path, policy: dict[str, Any], model: dict[str, Any], bits: int
) -> None:
    assert resolved_bits(tmp_path, policy, **model) == bits


@pytest.mark.parametrize(
    ("model", "found"),
    [({"head_dim": 24}, "heads of 24 dimensions"), ({"attn_logit_softcapping": 30.0}, "attention has a soft cap")],
)
def test_bits_that_could_not_be_read_are_refused(tmp_path: Path, model: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=f"cold_bits=4 is not possible here: .*{found}.* Set it to 0 or 'auto'"):
        resolved_bits(tmp_path, {"cold_bits": 4}, **model)


def test_without_the_library_auto_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    assert resolved_bits(tmp_path, {}) == 0


def test_why_there_are_none_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.INFO):
        resolved_bits(tmp_path, {}, head_dim=24)
    assert "no cold pages (cold_bits=0): heads of 24 dimensions" in caplog.text


def pool() -> PagePool:
    backing = torch.zeros(2, 4, 2, BLOCK, 2 * DIM)
    return PagePool(list(backing.unbind()))


def layer(**parts: Any) -> SimpleNamespace:
    impl = {"scale": 0.25, "alibi_slopes": None, "logits_soft_cap": 0.0, "sliding_window": -1, "deltamem_kernel": None}
    return SimpleNamespace(impl=SimpleNamespace(**impl | parts))


def test_every_layer_gets_the_kernel() -> None:
    layers = [layer(), layer()]
    install_kernel(layers, COLD, make_layout("keys_transposed", BLOCK, DIM), pool())
    assert all(one.impl.deltamem_kernel is not None for one in layers)


def test_hot_pages_alone_are_read_by_it_on_a_cpu_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    hot, layers = make_layout("keys_transposed", BLOCK, DIM), [layer()]
    install_kernel(layers, None, hot, pool())
    kernel = layers[0].impl.deltamem_kernel
    assert kernel.wants(SimpleNamespace(cold=None)), "it is the faster one"

    monkeypatch.setattr(native, "available", lambda: False)
    layers = [layer(), layer()]
    install_kernel(layers[:1], None, hot, pool())
    assert layers[0].impl.deltamem_kernel is None, "plain torch is no faster than the backend"
    install_kernel(layers[1:], COLD, hot, pool())
    kernel = layers[1].impl.deltamem_kernel
    assert kernel.wants(SimpleNamespace(cold=object()))
    assert not kernel.wants(SimpleNamespace(cold=None))


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap on logits"),
        ({"sliding_window": (127, 0)}, "a sliding window"),
    ],
)
def test_attention_that_the_kernel_does_not_know(part: dict[str, Any], name: str) -> None:
    hot = make_layout("keys_transposed", BLOCK, DIM)
    with pytest.raises(ValueError, match=f"attention with {name}.*cold_bits 0"):
        install_kernel([layer(**part)], COLD, hot, pool())
    hot_only = layer(**part)
    install_kernel([hot_only], None, hot, pool())
    assert hot_only.impl.deltamem_kernel is None, "the backend reads it"


def test_a_tiled_layout_keeps_the_backends_kernel() -> None:
    layers = [layer()]
    install_kernel(layers, None, make_layout("tiled", BLOCK, DIM), pool())
    assert layers[0].impl.deltamem_kernel is None


def test_the_tier_is_what_the_configuration_says() -> None:
    hot = make_layout("keys_transposed", BLOCK, DIM)
    assert cold_tier(DeltaMemConfig(cold_bits=0), pool(), hot) is None
    measured = cold_tier(DeltaMemConfig(cold_bits=4), pool(), hot)
    given = cold_tier(DeltaMemConfig(cold_bits=8, cold_loss=0.25), pool(), hot)
    assert measured is not None and given is not None
    assert (measured.layout, measured.loss) == (COLD, LOSS[4])
    assert (given.layout.bits, given.loss) == (8, 0.25)


def test_pages_that_would_hold_no_more_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # 8 bits of a 16-bit cache in tiny pages: scales take what the codes save.
    small = PagePool(list(torch.zeros(1, 4, 1, 4, 2 * DIM, dtype=torch.bfloat16).unbind()))
    with pytest.raises(ValueError, match="nothing is saved. Use larger blocks"):
        cold_tier(DeltaMemConfig(cold_bits=8), small, make_layout("slot_major", 4, DIM))
    assert paged_attention.LOSS[8] < paged_attention.LOSS[4] < paged_attention.LOSS[2]
