# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The attention seam: vLLM's own backends, which also record the observation window and read dealt pages.

The step's ``WindowWrite`` and ``DealtRead`` ride on the attention metadata, so a captured CUDA graph holds on to the
same buffers that later steps fill.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_layout import KVCacheLayout

from deltamem_vllm.integration.dealt_read import ReadsDealtPages
from deltamem_vllm.scoring.window import WindowWrite, record

OBSERVED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")
"""Backends with an observed version; any other is refused when the scorer needs queries or pages are dealt."""


class ObservesQueries:
    """Mixed in before an attention implementation: records the post-RoPE queries it is given.

    Attributes
    ----------
    deltamem_ring: [rows, H_q, D], this layer's ring; None until the worker installs it.
    """

    deltamem_ring: Tensor | None = None

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        write: WindowWrite | None = getattr(attn_metadata, "deltamem_window", None)
        if write is not None and self.deltamem_ring is not None:
            record(self.deltamem_ring, write, query)
        result: Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, *args, **kwargs
        )
        return result


def _observed(name: str, backend: type) -> type:
    impl = backend.get_impl_cls()  # type: ignore[attr-defined]
    observed_impl = type(
        f"Observed{impl.__name__}",
        (ObservesQueries, ReadsDealtPages, impl),
        {"__module__": __name__, "deltamem_backend": name},
    )
    return type(
        f"Observed{backend.__name__}",
        (backend,),
        {
            "__module__": __name__,
            "get_impl_cls": staticmethod(lambda: observed_impl),
            # A page must be one piece of memory: heads outside of tokens. GPU backends would choose the other order.
            "supported_kv_cache_layouts": classmethod(lambda cls: (KVCacheLayout.LBHNC,)),
        },
    )


_built: dict[str, type] = {}


def __getattr__(name: str) -> type:
    """Build ``Observed_<BACKEND>`` when vLLM resolves it: importing a GPU backend on a CPU build would fail."""
    backend = name.removeprefix("Observed_")
    if backend == name or backend not in _STOCK_PATHS:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    if backend not in _built:
        module, _, qualname = _STOCK_PATHS[backend].rpartition(".")
        _built[backend] = _observed(backend, getattr(importlib.import_module(module), qualname))
    return _built[backend]


# Read before register() overrides them.
_STOCK_PATHS = {name: AttentionBackendEnum[name].get_path() for name in OBSERVED}


def register() -> None:
    """Make vLLM use the observed version of each backend in this process. Safe to call again."""
    for name in OBSERVED:
        register_backend(AttentionBackendEnum[name], f"{__name__}.Observed_{name}")
