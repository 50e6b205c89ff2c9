# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Where cold pages can be read, and what `cold_bits: auto` means on a machine."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from deltamem_vllm.config import AUTO, ConfigError, DeltaMemConfig
from deltamem_vllm.ops import native

HEAD_STEP, MOST_DIM = 16, 256
"""Head sizes that the kernels know: multiples of the first up to the second."""


def why_no_cold(vllm_config: Any, config: DeltaMemConfig) -> str | None:
    """Why this server has no cold pages; None if it has.

    Raises
    ------
    ConfigError: the configuration wants some, and they could not be read.
    """
    if config.cold_bits == 0:
        return "the configuration says so"
    if config.dealing == "equal":
        return "pages are not dealt"
    unread = _why_unread(vllm_config)
    if config.cold_bits != AUTO:
        if unread is not None:
            raise ConfigError(
                f"deltamem config: cold_bits={config.cold_bits} is not possible here: {unread}. Set it to 0 or 'auto'."
            )
        return None
    if unread is not None:
        return unread
    if not current_platform.is_cpu():
        return "their speed was not measured on this kind of device; cold_bits 4 turns them on"
    if not native.available():
        return "the native library is missing, and plain torch reads them slowly"
    return None


def _why_unread(vllm_config: Any) -> str | None:
    """What keeps our attention kernels from serving a model."""
    model = vllm_config.model_config
    text = model.hf_text_config
    dim = model.get_head_size()
    if dim % HEAD_STEP or dim > MOST_DIM:
        return f"heads of {dim} dimensions; multiples of {HEAD_STEP} up to {MOST_DIM} are supported"
    if vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16"):
        return f"the KV cache is of type {vllm_config.cache_config.cache_dtype}; the model's own is supported"
    if getattr(text, "attn_logit_softcapping", None):
        return "the model's attention has a soft cap"
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        return "the model's attention has ALiBi biases"
    if current_platform.is_cpu() and model.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return "vLLM keeps keys in AMX tiles on this CPU, which the kernel does not read"
    return None
