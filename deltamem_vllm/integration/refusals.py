# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What is not served exactly is refused at start, all of it in one error.

Three tables of rows, by what has to be known: the configuration (checked before any process starts), the KV
cache specs of the loaded model, and the model runner. A row finds a feature and says what is served instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import vllm.envs as envs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, KVQuantMode

if TYPE_CHECKING:
    from vllm.config import VllmConfig

T = TypeVar("T")

_WITHOUT = "start without --kv-cache-policy deltamem"


@dataclass(frozen=True)
class Refusal(Generic[T]):
    """One feature that is not served.

    Parameters
    ----------
    name
        The feature.
    find
        Returns what was found, or None if the feature is not in use.
    supported
        What is served instead.
    fix
        What the user can do, besides starting without the policy.
    """

    name: str
    find: Callable[[T], str | None]
    supported: str
    fix: str


class UnsupportedFeatures(ValueError):
    """The configuration or the model uses features that the policy does not serve. `names` lists them."""

    def __init__(self, rows: list[tuple[str, str, str, str]]) -> None:
        self.names = tuple(row[0] for row in rows)
        lines = [f"  {name}: found {found}; supported: {ok}; {fix}" for name, found, ok, fix in rows]
        super().__init__(
            "deltamem does not serve this configuration exactly, so it does not start:\n"
            + "\n".join(lines)
            + f"\nOr {_WITHOUT}."
        )


def check_supported(
    vllm_config: VllmConfig,
    kv_cache_specs: Mapping[str, KVCacheSpec] | None = None,
    model_runner: Any = None,
) -> None:
    """Raise `UnsupportedFeatures` with everything that is not served exactly.

    Parameters
    ----------
    vllm_config
        Always checked.
    kv_cache_specs
        Layer name -> spec, as the worker reports it, before or after conversion to our type.
    model_runner
        The runner, after the model was loaded and before it is hooked.
    """
    rows = _matches(CONFIG_REFUSALS, vllm_config)
    if kv_cache_specs is not None:
        rows += _matches(SPEC_REFUSALS, kv_cache_specs)
    if model_runner is not None:
        rows += _matches(RUNNER_REFUSALS, model_runner)
    if rows:
        raise UnsupportedFeatures(rows)


def _matches(table: Iterable[Refusal[T]], subject: T) -> list[tuple[str, str, str, str]]:
    found = ((row, row.find(subject)) for row in table)
    return [(row.name, what, row.supported, row.fix) for row, what in found if what is not None]


def _when(condition: object, what: str) -> str | None:
    return what if condition else None


_PLAIN_CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16")


def _cache_dtype(c: VllmConfig) -> str | None:
    dtype = str(c.cache_config.cache_dtype)
    return _when(dtype not in _PLAIN_CACHE_DTYPES, f"kv_cache_dtype={dtype}")


def _context_parallel(c: VllmConfig) -> str | None:
    p = c.parallel_config
    dcp, pcp = p.decode_context_parallel_size, p.prefill_context_parallel_size
    return _when(max(dcp, pcp) > 1, f"decode_context_parallel_size={dcp}, prefill_context_parallel_size={pcp}")


def _moe_data_parallel(c: VllmConfig) -> str | None:
    p = c.parallel_config
    return _when(p.data_parallel_size > 1 and p.is_moe_model, f"data_parallel_size={p.data_parallel_size}, experts")


CONFIG_REFUSALS: tuple[Refusal[VllmConfig], ...] = (
    Refusal(
        "MLA",
        lambda c: _when(c.model_config.use_mla, f"{c.model_config.architecture}"),
        "attention with keys and values per head (MHA, GQA, MQA)",
        "use a model without multi-head latent attention",
    ),
    Refusal(
        "sliding window",
        lambda c: _when(c.model_config.get_sliding_window(), f"a window of {c.model_config.get_sliding_window()}"),
        "full attention in every layer",
        "use a model without sliding-window layers",
    ),
    Refusal(
        "chunked-local attention",
        lambda c: _when(
            getattr(c.model_config.hf_text_config, "attention_chunk_size", None),
            f"attention_chunk_size={getattr(c.model_config.hf_text_config, 'attention_chunk_size', None)}",
        ),
        "full attention in every layer",
        "use a model without chunked-local attention",
    ),
    Refusal(
        "ALiBi",
        # The bias of an entry follows from its slot in the cache, and compaction moves entries.
        lambda c: _when(c.model_config.uses_alibi, f"{c.model_config.architecture}"),
        "rotary or learned positions",
        "use a model without ALiBi",
    ),
    Refusal(
        "hybrid or recurrent model",
        lambda c: _when(c.model_config.is_hybrid or c.model_config.is_attention_free, f"{c.model_config.architecture}"),
        "models whose every layer is attention",
        "use a model without Mamba or linear-attention layers",
    ),
    Refusal(
        "encoder-decoder model",
        lambda c: _when(c.model_config.is_encoder_decoder, f"{c.model_config.architecture}"),
        "decoder-only models",
        "use a decoder-only model",
    ),
    Refusal(
        "pooling model",
        lambda c: _when(c.model_config.runner_type != "generate", f"runner={c.model_config.runner_type}"),
        "models that generate text",
        "use --runner generate",
    ),
    Refusal(
        "diffusion model",
        lambda c: _when(
            c.model_config.is_diffusion or c.diffusion_config is not None, f"{c.model_config.architecture}"
        ),
        "autoregressive models",
        "use an autoregressive model",
    ),
    Refusal(
        "multimodal model",
        lambda c: _when(c.model_config.is_multimodal_model, f"{c.model_config.architecture}"),
        "text-only models (others are not tested yet)",
        "use a text-only model",
    ),
    Refusal(
        "quantised KV cache",
        _cache_dtype,
        "--kv-cache-dtype " + ", ".join(_PLAIN_CACHE_DTYPES),
        "drop --kv-cache-dtype",
    ),
    Refusal(
        "KV sharing fast prefill",
        lambda c: _when(c.cache_config.kv_sharing_fast_prefill, "kv_sharing_fast_prefill"),
        "every layer reads its whole prompt",
        "drop --kv-sharing-fast-prefill",
    ),
    Refusal(
        "speculative decoding",
        lambda c: _when(c.speculative_config is not None, f"method={getattr(c.speculative_config, 'method', None)}"),
        "one token per step and request",
        "drop --speculative-config",
    ),
    Refusal(
        "KV connector",
        # Offloading, which has a row of its own, is done by a connector that nobody asked for by name.
        lambda c: _when(
            c.kv_transfer_config is not None and c.cache_config.kv_offloading_size is None,
            f"kv_connector={getattr(c.kv_transfer_config, 'kv_connector', None)}",
        ),
        "KV memory of this server alone",
        "drop --kv-transfer-config",
    ),
    Refusal(
        "KV offloading",
        lambda c: _when(
            c.cache_config.kv_offloading_size is not None,
            f"kv_offloading_size={c.cache_config.kv_offloading_size}",
        ),
        "KV memory of this server alone",
        "drop --kv-offloading-size",
    ),
    Refusal(
        "HiSparse",
        lambda c: _when(c.attention_config.hisparse_config is not None, "attention_config.hisparse_config"),
        "KV memory on the device alone",
        "drop --attention-config.hisparse_config",
    ),
    Refusal(
        "KV events",
        lambda c: _when(
            c.kv_events_config is not None and c.kv_events_config.enable_kv_cache_events,
            "enable_kv_cache_events",
        ),
        "no publishing of KV events (not tested yet)",
        "drop --kv-events-config",
    ),
    Refusal("context parallelism", _context_parallel, "tensor parallelism", "use --tensor-parallel-size"),
    Refusal(
        "pipeline parallelism",
        lambda c: _when(
            c.parallel_config.pipeline_parallel_size > 1,
            f"pipeline_parallel_size={c.parallel_config.pipeline_parallel_size}",
        ),
        "tensor parallelism (pipelines are not tested yet)",
        "use --tensor-parallel-size",
    ),
    Refusal(
        "data parallelism of experts",
        _moe_data_parallel,
        "data parallelism of dense models, tensor parallelism",
        "set --data-parallel-size 1",
    ),
    Refusal(
        "elastic expert parallelism",
        lambda c: _when(c.parallel_config.enable_elastic_ep, "enable_elastic_ep"),
        "a fixed number of engines",
        "drop --enable-elastic-ep",
    ),
    Refusal(
        "dual-batch overlap",
        lambda c: _when(c.parallel_config.use_ubatching, f"{c.parallel_config.num_ubatches} micro-batches"),
        "one batch per step",
        "drop --enable-dbo and --ubatch-size",
    ),
    Refusal(
        "routed-experts output",
        # It is looked up by the slots a finished request holds, and compaction moves entries between slots.
        lambda c: _when(c.aux_output_config.enabled, "enable_return_routed_experts"),
        "text and log-probabilities",
        "drop --enable-return-routed-experts",
    ),
    Refusal(
        "Rust front end",
        lambda c: _when(envs.VLLM_USE_RUST_FRONTEND, "VLLM_USE_RUST_FRONTEND"),
        "the Python API server, which checks per-request options",
        "unset VLLM_USE_RUST_FRONTEND",
    ),
)


Specs = Mapping[str, KVCacheSpec]


def _plain(spec: KVCacheSpec) -> bool:
    from deltamem_vllm.integration.spec import DeltaMemSpec

    return type(spec) in (FullAttentionSpec, DeltaMemSpec)


def _layers(specs: Specs, wrong: Callable[[Any], object]) -> str | None:
    """The first layers for which ``wrong`` holds, of those with plain full attention."""
    names = [name for name, spec in specs.items() if _plain(spec) and wrong(spec)]
    return _when(names, f"{len(names)} of {len(specs)} layers, first {names[0] if names else ''}")


def _other_specs(specs: Specs) -> str | None:
    kinds = sorted({type(spec).__name__ for spec in specs.values() if not _plain(spec)})
    return _when(kinds, ", ".join(kinds))


def _several_groups(specs: Specs) -> str | None:
    plain: list[Any] = [spec for spec in specs.values() if _plain(spec)]
    shapes = {(spec.block_size, spec.num_kv_heads, spec.head_size, spec.dtype) for spec in plain}
    return _when(len(shapes) > 1, f"{len(shapes)} different layer shapes")


SPEC_REFUSALS: tuple[Refusal[Specs], ...] = (
    Refusal(
        "no KV cache",
        lambda s: _when(not s, "no layer with a KV cache"),
        "attention layers",
        "use another model",
    ),
    Refusal("layer type", _other_specs, "FullAttentionSpec in every layer", "use a model with full attention only"),
    Refusal(
        "sliding-window layer",
        lambda s: _layers(s, lambda spec: spec.sliding_window is not None),
        "full attention in every layer",
        "use a model without sliding-window layers",
    ),
    Refusal(
        "chunked-local layer",
        lambda s: _layers(s, lambda spec: spec.attention_chunk_size is not None),
        "full attention in every layer",
        "use a model without chunked-local attention",
    ),
    Refusal(
        "non-causal layer",
        lambda s: _layers(s, lambda spec: spec.non_causal),
        "causal attention",
        "use another model",
    ),
    Refusal(
        "quantised layer cache",
        lambda s: _layers(s, lambda spec: spec.kv_quant_mode != KVQuantMode.NONE),
        "unquantised KV cache",
        "drop --kv-cache-dtype",
    ),
    Refusal(
        "values wider or narrower than keys",
        lambda s: _layers(s, lambda spec: spec.head_size_v != spec.head_size),
        "one head size for keys and values",
        "use another model",
    ),
    Refusal("several KV cache groups", _several_groups, "one shape in every layer", "use another model"),
)


def _model_state(runner: Any) -> str | None:
    state = getattr(runner, "model_state", None)
    if state is None:
        return None  # Model Runner V1 has none.
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    return _when(type(state) is not DefaultModelState, type(state).__name__)


def _attention_layers(runner: Any, wrong: Callable[[Any], object]) -> str | None:
    context = runner.vllm_config.compilation_config.static_forward_context
    names = [name for name, layer in context.items() if wrong(layer)]
    return _when(names, f"{len(names)} layers, first {names[0] if names else ''}")


RUNNER_REFUSALS: tuple[Refusal[Any], ...] = (
    Refusal("model state", _model_state, "DefaultModelState", "use a decoder-only text model"),
    Refusal(
        "layers that share KV",
        lambda r: _attention_layers(r, lambda layer: getattr(layer, "kv_sharing_target_layer_name", None)),
        "a KV cache of its own in every layer",
        "use a model without cross-layer KV sharing",
    ),
    Refusal(
        "ALiBi layers",
        lambda r: _attention_layers(
            r, lambda layer: getattr(getattr(layer, "impl", None), "alibi_slopes", None) is not None
        ),
        "rotary or learned positions",
        "use a model without ALiBi",
    ),
)
