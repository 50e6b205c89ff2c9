# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a model's name means here, without making or downloading anything."""

from __future__ import annotations

from deltamem_vllm.models.catalog import CATALOG
from deltamem_vllm.models.store import cache_root


def local_name(model: str) -> str:
    """An embedded model's folder, whether or not it was made yet; anything else as vLLM takes it."""
    return str(CATALOG[model].entry(cache_root()).path) if model in CATALOG else model


def how_to_get(model: str) -> str:
    """What brings a model onto this machine."""
    if model in CATALOG:
        return f"run: deltamem model get {model}"
    return f"check the name, or download it (hf download {model}); vLLM does so itself when it serves it"
