# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Every feature that is not served exactly is refused with what was found, what is served and what to do.

Configurations are vLLM's own, made from its engine arguments; where one would need hardware or files that are
not here, one field of a real configuration is changed.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import (
    HiSparseConfig,
    KVEventsConfig,
    KVTransferConfig,
    VllmConfig,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, SlidingWindowSpec

from deltamem_vllm.config import ConfigError
from deltamem_vllm.integration.engine_args import scheduler_path
from deltamem_vllm.integration.refusals import UnsupportedFeatures, check_supported
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
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


def engine_args(directory: Path, model: dict[str, Any] | None = None, **kwargs: Any) -> EngineArgs:
    register()
    (directory / "config.json").write_text(json.dumps({**LLAMA, **(model or {})}))
    kwargs.setdefault("additional_config", {"deltamem": {}})
    return EngineArgs(model=str(directory), skip_tokenizer_init=True, enforce_eager=True, **kwargs)


def refused(directory: Path, model: dict[str, Any] | None = None, **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(UnsupportedFeatures) as error:
        engine_args(directory, model, **kwargs).create_engine_config()
    return error.value.names


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    return engine_args(tmp_path_factory.mktemp("base")).create_engine_config()


# What vLLM's own arguments can ask for on this machine.


def test_a_plain_model_is_served(base: VllmConfig) -> None:
    check_supported(base)


@pytest.mark.parametrize(
    ("name", "model", "kwargs"),
    [
        (
            "MLA",
            {
                "architectures": ["DeepseekV2ForCausalLM"],
                "model_type": "deepseek_v2",
                "kv_lora_rank": 16,
                "q_lora_rank": None,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 16,
                "v_head_dim": 16,
                "num_key_value_heads": 4,
            },
            {},
        ),
        (
            "sliding window",
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
            {},
        ),
        (
            "ALiBi",
            {
                "architectures": ["BloomForCausalLM"],
                "model_type": "bloom",
                "n_layer": 2,
                "n_head": 4,
                "seq_length": 512,
            },
            {},
        ),
        (
            "hybrid or recurrent model",
            {
                "architectures": ["MambaForCausalLM"],
                "model_type": "mamba",
                "state_size": 16,
                "time_step_rank": 4,
                "conv_kernel": 4,
                "expand": 2,
            },
            {},
        ),
        ("pooling model", {}, {"runner": "pooling"}),
        ("quantised KV cache", {}, {"kv_cache_dtype": "fp8"}),
        ("KV sharing fast prefill", {}, {"kv_sharing_fast_prefill": True}),
        (
            "speculative decoding",
            {},
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 2,
                    "prompt_lookup_min": 1,
                }
            },
        ),
        (
            "KV connector",
            {},
            {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")},
        ),
        ("KV offloading", {}, {"kv_offloading_size": 1.0}),
        (
            "KV events",
            {},
            {"kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null")},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_before_anything_starts(
    tmp_path: Path, name: str, model: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    assert name in refused(tmp_path, model, **kwargs)


# What needs other hardware, other processes or other models: one field of a real configuration.


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("chunked-local attention", "model_config.hf_text_config.attention_chunk_size", 64),
        ("encoder-decoder model", "model_config.is_encoder_decoder", True),
        ("diffusion model", "model_config.is_diffusion", True),
        ("multimodal model", "model_config.multimodal_config", SimpleNamespace()),
        ("HiSparse", "attention_config.hisparse_config", HiSparseConfig()),
        ("context parallelism", "parallel_config.decode_context_parallel_size", 2),
        ("context parallelism", "parallel_config.prefill_context_parallel_size", 2),
        ("pipeline parallelism", "parallel_config.pipeline_parallel_size", 2),
        ("elastic expert parallelism", "parallel_config.enable_elastic_ep", True),
        ("dual-batch overlap", "parallel_config.enable_dbo", True),
        ("dual-batch overlap", "parallel_config.ubatch_size", 2),
        ("routed-experts output", "aux_output_config.enable_return_routed_experts", True),
    ],
)
def test_refused_by_one_field(base: VllmConfig, name: str, path: str, value: Any) -> None:
    config = copy.deepcopy(base)
    check_supported(config)
    owner: Any = config
    *parents, last = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    # Past the validation of fields: some values need hardware that is not here.
    object.__setattr__(owner, last, value)
    with pytest.raises(UnsupportedFeatures) as error:
        check_supported(config)
    assert error.value.names == (name,)


def test_data_parallel_experts_are_refused_and_dense_models_are_not(base: VllmConfig) -> None:
    config = copy.deepcopy(base)
    object.__setattr__(config.parallel_config, "data_parallel_size", 2)
    check_supported(config)
    object.__setattr__(config.parallel_config, "is_moe_model", True)
    with pytest.raises(UnsupportedFeatures, match="data_parallel_size=2, experts"):
        check_supported(config)


def test_the_rust_front_end_is_refused(base: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(UnsupportedFeatures, match="Rust front end"):
        check_supported(base)


def test_all_refusals_come_in_one_error_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatures) as error:
        engine_args(tmp_path, kv_cache_dtype="fp8", kv_sharing_fast_prefill=True).create_engine_config()
    assert error.value.names == ("quantised KV cache", "KV sharing fast prefill")
    text = str(error.value)
    assert "quantised KV cache: found kv_cache_dtype=fp8; supported: --kv-cache-dtype auto" in text
    assert "drop --kv-sharing-fast-prefill" in text
    assert "start without --kv-cache-policy deltamem" in text


def test_without_the_policy_nothing_is_refused(tmp_path: Path) -> None:
    config = engine_args(tmp_path, kv_cache_dtype="fp8", additional_config={"x": 1}).create_engine_config()
    assert config.additional_config == {"x": 1}
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"


# What the loaded model shows.


def spec(**kwargs: Any) -> FullAttentionSpec:
    return FullAttentionSpec(**{"block_size": 16, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32, **kwargs})


@pytest.mark.parametrize(
    ("name", "specs"),
    [
        ("no KV cache", []),
        (
            "layer type",
            [SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float32, sliding_window=8)],
        ),
        ("sliding-window layer", [spec(sliding_window=8)]),
        ("chunked-local layer", [spec(attention_chunk_size=8)]),
        ("non-causal layer", [spec(non_causal=True)]),
        ("quantised layer cache", [spec(kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)]),
        ("values wider or narrower than keys", [spec(head_size_v=8)]),
        ("several KV cache groups", [spec(), spec(num_kv_heads=1)]),
    ],
)
def test_layers_that_are_not_served(base: VllmConfig, name: str, specs: list[Any]) -> None:
    with pytest.raises(UnsupportedFeatures) as error:
        check_supported(base, kv_cache_specs={f"layer.{i}": s for i, s in enumerate(specs)})
    assert error.value.names == (name,)


def test_plain_layers_are_served_before_and_after_conversion(base: VllmConfig) -> None:
    from deltamem_vllm.integration.spec import convert

    specs: dict[str, Any] = {"layer.0": spec(), "layer.1": spec()}
    check_supported(base, kv_cache_specs=specs)
    check_supported(base, kv_cache_specs=convert(specs))


# What the loaded runner shows. Only the attributes that are read are made up; the configuration is real.


def runner(base: VllmConfig, layer: Any, **attributes: Any) -> Any:
    config = copy.deepcopy(base)
    config.compilation_config.static_forward_context = {"layer.0": layer}
    return SimpleNamespace(vllm_config=config, **attributes)


@pytest.mark.parametrize(
    ("name", "layer", "attributes"),
    [
        ("model state", SimpleNamespace(), {"model_state": SimpleNamespace()}),
        ("layers that share KV", SimpleNamespace(kv_sharing_target_layer_name="layer.1"), {}),
        ("ALiBi layers", SimpleNamespace(impl=SimpleNamespace(alibi_slopes=[0.5])), {}),
    ],
)
def test_runners_that_are_not_served(base: VllmConfig, name: str, layer: Any, attributes: dict[str, Any]) -> None:
    check_supported(base, model_runner=runner(base, SimpleNamespace()))
    with pytest.raises(UnsupportedFeatures) as error:
        check_supported(base, model_runner=runner(base, layer, **attributes))
    assert error.value.names == (name,)


# A user's own classes.


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("scheduler_cls", "vllm.v1.core.sched.scheduler.Scheduler"),
        ("worker_cls", "vllm.v1.worker.cpu_worker.CPUWorker"),
    ],
)
def test_foreign_classes_are_refused(tmp_path: Path, option: str, given: str) -> None:
    with pytest.raises(ConfigError, match=f"its own {option}, but got '{given}'; allowed: a subclass of"):
        engine_args(tmp_path, **{option: given}).create_engine_config()


def test_our_classes_are_set_and_a_subclass_of_them_is_kept(tmp_path: Path, base: VllmConfig) -> None:
    ours = "deltamem_vllm.integration"
    assert base.scheduler_config.scheduler_cls == f"{ours}.scheduler.DeltaMemScheduler", "CPU: not async"
    assert base.parallel_config.worker_cls == f"{ours}.worker.DeltaMemCPUWorker"
    asynchronous = f"{ours}.scheduler.DeltaMemAsyncScheduler"
    config = engine_args(tmp_path, scheduler_cls=asynchronous).create_engine_config()
    assert config.scheduler_config.scheduler_cls == asynchronous


def test_asynchronous_scheduling_gets_the_asynchronous_class(base: VllmConfig) -> None:
    config = copy.deepcopy(base)
    config.scheduler_config.scheduler_cls = None
    config.scheduler_config.async_scheduling = True
    assert scheduler_path(config) == "deltamem_vllm.integration.scheduler.DeltaMemAsyncScheduler"
