# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The KV cache spec that makes vLLM build our manager, and lowers the start-up bound on the pool."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.integration.manager import DeltaMemManager
from deltamem_vllm.memory.admission import peak_blocks
from deltamem_vllm.memory.budgets import budget_for
from deltamem_vllm.request_options import RequestOptions


@dataclass(frozen=True, kw_only=True)
class DeltaMemSpec(FullAttentionSpec):
    """Full attention whose requests may hold fewer tokens than they have seen."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes one request of max_model_len tokens needs; vLLM refuses to start with a smaller pool."""
        dense: int = super().max_memory_usage_bytes(vllm_config)
        config = DeltaMemConfig.from_additional_config(vllm_config.additional_config)
        max_model_len = vllm_config.model_config.max_model_len
        blocks = peak_blocks(
            budget_for(RequestOptions.from_extra_args(None, config), config),
            prompt_len=max_model_len,
            max_new_tokens=0,
            block_size=self.block_size,
            chunk_tokens=vllm_config.max_in_flight_tokens,
            max_model_len=max_model_len,
        )
        return min(dense, blocks * self.page_size_bytes)

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> DeltaMemSpec:
        """The same layer's spec under our type."""
        return cls(**{f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init})


def convert(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Replace each plain full-attention spec (layer name -> spec) by ours; other types are refused elsewhere."""
    return {name: DeltaMemSpec.of(s) if type(s) is FullAttentionSpec else s for name, s in specs.items()}


def register() -> None:
    """Tell vLLM which manager serves our spec. Safe to call again."""
    # vLLM registers its own specs only while the registry is empty: ours must not be the first.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(DeltaMemSpec, manager_class=DeltaMemManager, uniform_type_base_spec=FullAttentionSpec)
