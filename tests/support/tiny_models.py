# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Random-weight models of the served families, small enough for a full exactness run in seconds.

Weights are scaled so that attention is peaked and log-probs are far from uniform: taking a token away changes
the output strongly, so a test that ignores the eviction mask fails clearly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LAYERS = 3
HIDDEN = 128
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 32
VOCAB = 512
MAX_POSITIONS = 4096

# Standard deviation of q . k / sqrt(D) over random tokens: the softmax over some hundred tokens rests on a
# few.
_LOGIT_STD = 2.5
_LM_HEAD_STD = 3.0

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

MHA = "llama-mha"
"""The first family with as many kv heads as query heads."""


def build_tiny_model(family: str, directory: Path, seed: int = 0) -> Path:
    """Write a float32 checkpoint of ``family`` to ``directory / name`` and return that path.

    A checkpoint written before with the same arguments is reused.
    """
    if not is_tiny(family):
        raise ValueError(f"unknown family {family!r}; available: {', '.join((*FAMILIES, MHA))}")
    path = directory / f"tiny-{family}-{seed}"
    done = path / "complete.json"
    if done.is_file():
        return path
    model = _model_class(family)(_config(family))
    _fill(model, torch.Generator().manual_seed(seed))
    model.to(torch.float32).save_pretrained(path, safe_serialization=True)
    done.write_text(json.dumps({"family": family, "seed": seed}))
    return path


def is_tiny(family: str) -> bool:
    """Whether `build_tiny_model` knows it."""
    return family in FAMILIES or family == MHA


def _model_class(family: str) -> Any:
    import transformers

    names = {"llama": "Llama", MHA: "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return getattr(transformers, names[family] + "ForCausalLM")


def _config(family: str) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS if family == MHA else KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    if family == "mistral":
        return transformers.MistralConfig(**common, head_dim=HEAD_DIM, sliding_window=None)
    if family == "qwen2":
        return transformers.Qwen2Config(**common)
    if family == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=HEAD_DIM)
    return transformers.LlamaConfig(**common, head_dim=HEAD_DIM)


@torch.no_grad()
def _fill(model: torch.nn.Module, gen: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if name.endswith("bias"):
            parameter.normal_(0.0, 0.3, generator=gen)
        elif kind in ("q_norm", "k_norm"):
            # Normed queries and keys have unit variance, so the product of the two gains is the logits'
            # deviation.
            parameter.fill_(_LOGIT_STD**0.5)
        elif "norm" in kind:
            parameter.uniform_(0.8, 1.2, generator=gen)
        elif kind in ("q_proj", "k_proj"):
            parameter.normal_(0.0, (_LOGIT_STD / HIDDEN) ** 0.5, generator=gen)
        elif kind == "lm_head":
            parameter.normal_(0.0, _LM_HEAD_STD / HIDDEN**0.5, generator=gen)
        elif kind == "embed_tokens":
            parameter.normal_(0.0, 1.0, generator=gen)
        else:
            parameter.normal_(0.0, 1.0 / parameter.shape[1] ** 0.5, generator=gen)
