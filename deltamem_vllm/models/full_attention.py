# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What in a model's configuration is more than a decoder with plain full attention in every layer."""

from __future__ import annotations

from typing import Any


def other_than_full_attention(config: Any) -> str:
    """Name the first feature of a transformers configuration that deltamem does not serve; empty if there is none."""
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder and a decoder"
    if config.get_text_config() is not config:
        return "several modalities"
    if getattr(config, "kv_lora_rank", None):
        return f"multi-head latent attention (kv_lora_rank={config.kv_lora_rank})"
    if other := sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention"}):
        return f"layers of type {', '.join(other)}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"sliding-window attention (sliding_window={config.sliding_window})"
    if getattr(config, "attention_chunk_size", None):
        return f"chunked-local attention (attention_chunk_size={config.attention_chunk_size})"
    if getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt"):
        return "ALiBi"
    if getattr(config, "num_kv_shared_layers", 0):
        return f"layers that share KV (num_kv_shared_layers={config.num_kv_shared_layers})"
    return ""
