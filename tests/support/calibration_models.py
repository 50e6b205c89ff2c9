# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Tiny models with a tokenizer, and made-up calibrations, for the tests of `deltamem calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.artifact import Calibration, Card
from deltamem_vllm.calibration.fingerprint import Geometry
from tests.support.tiny_models import HEAD_DIM, HEADS, KV_HEADS, LAYERS, build_tiny_model

GEOMETRY = Geometry(LAYERS, HEADS, KV_HEADS, HEAD_DIM)
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i + 2 for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = template
    return fast


def calibration_model(family: str, root: Path) -> Path:
    """Folder of a tiny model with a tokenizer; both kinds: instruction-tuned and base models."""
    folder = build_tiny_model(family, root)
    if not (folder / "tokenizer.json").exists():
        byte_tokenizer(None if family == "mistral" else TEMPLATE).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of a model's config.json; those set to "drop" go."""
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    kept = {name: value for name, value in config.items() if value != "drop"}
    (folder / "config.json").write_text(json.dumps(kept))


def falling(*shape: int) -> Tensor:
    """Random numbers in [0, 1], falling along the last dimension."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values


def made_for(own: str = "f" * 64, geometry: Geometry = GEOMETRY) -> Calibration:
    """A calibration of made-up numbers for the model with this fingerprint."""
    card = Card("some/model", own, geometry, {"shares": {"0.5": {"layers": [0.5, 0.25, 0.75]}}})
    return Calibration(card, {"rank_utility": falling(geometry.layers, geometry.kv_heads, 16)})
