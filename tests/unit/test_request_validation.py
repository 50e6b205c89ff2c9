# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Requests that cannot be served as asked are refused, with vLLM's own configuration and parameters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from deltamem_vllm.integration import request_validation
from deltamem_vllm.integration.request_validation import RequestRefused, check_request
from deltamem_vllm.plugin import register

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    """Policy on, keep_ratio 0.25 from 64 tokens, and a pool of 20 usable blocks of 32 tokens."""
    register()
    directory: Path = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(MODEL))
    config = EngineArgs(
        model=str(directory),
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=32,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        additional_config={"deltamem": {"keep_ratio": 0.25, "min_tokens": 64}},
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = 21
    return config


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reasons: list[str] = []
    monkeypatch.setattr(request_validation, "on_refused", [reasons.append])
    return reasons


def params(max_tokens: int = 4, **xargs: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, extra_args=xargs or None)


def test_good_requests_pass(config: VllmConfig, heard: list[str]) -> None:
    check_request(config, params(), 100)
    check_request(config, params(deltamem_policy="off", other=1), 100)
    check_request(config, params(deltamem_keep_ratio=0.5, deltamem_min_tokens=0), None)
    check_request(config, PoolingParams(), 100)
    assert heard == []


def test_a_refusal_is_a_value_error_and_a_bad_request(config: VllmConfig, heard: list[str]) -> None:
    with pytest.raises(RequestRefused, match="deltamem_keep_ratio: got 2, allowed: a number") as error:
        check_request(config, params(deltamem_keep_ratio=2))
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, VLLMValidationError), "vLLM's servers answer 400 to this class"
    assert error.value.parameter == "deltamem_keep_ratio"
    assert heard == ["bad_option"]


def test_a_server_without_the_policy_refuses_our_keys(config: VllmConfig, heard: list[str]) -> None:
    stock = copy.deepcopy(config)
    stock.additional_config = {}
    check_request(stock, params(other=1), 100)
    with pytest.raises(RequestRefused, match="runs without the deltamem policy"):
        check_request(stock, params(deltamem_policy="off"), 100)
    assert heard == ["policy_inactive"]


def test_prompt_logprobs_only_where_nothing_is_evicted(config: VllmConfig, heard: list[str]) -> None:
    asking = SamplingParams(max_tokens=4, prompt_logprobs=1)
    check_request(config, asking, 63)
    with pytest.raises(RequestRefused, match="of 64 tokens, of which only 32 are sure to stay.*min_tokens=64"):
        check_request(config, asking, 64)
    for harmless in (
        {"deltamem_policy": "off"},
        {"deltamem_keep_ratio": 1},
        {"deltamem_keep_tokens": 64},
        {"deltamem_min_tokens": 65},
    ):
        asking.extra_args = harmless
        check_request(config, asking, 64)
    assert heard == ["prompt_logprobs"]


@pytest.mark.parametrize("mode", ["pressure", "always"])
@pytest.mark.parametrize("dealing", ["global", "equal"])
def test_prompt_logprobs_are_refused_where_keep_tokens_may_evict(config: VllmConfig, mode: str, dealing: str) -> None:
    """A number of tokens counts, not the share beside it, whatever makes the eviction happen."""
    asking = SamplingParams(max_tokens=4, prompt_logprobs=1)
    asking.extra_args = {"deltamem_keep_tokens": 96, "deltamem_mode": mode, "deltamem_dealing": dealing}
    check_request(config, asking, 96)
    with pytest.raises(RequestRefused, match="only 96 are sure to stay .on, keep_tokens=96"):
        check_request(config, asking, 97)


def test_a_whole_share_does_not_allow_prompt_logprobs_beside_keep_tokens(config: VllmConfig) -> None:
    server = copy.deepcopy(config)
    server.additional_config = {"deltamem": {"keep_ratio": 1.0, "keep_tokens": 96, "min_tokens": 64}}
    with pytest.raises(RequestRefused, match="keep_tokens=96"):
        check_request(server, SamplingParams(max_tokens=4, prompt_logprobs=1), 200)


def test_streaming_sessions_only_without_eviction(config: VllmConfig, heard: list[str]) -> None:
    check_request(config, params(deltamem_policy="off"), 10, resumable=True)
    with pytest.raises(RequestRefused, match="streaming input sessions"):
        check_request(config, params(), 10, resumable=True)
    assert heard == ["streaming_session"]


def test_requests_that_can_never_fit_are_refused(config: VllmConfig, heard: list[str]) -> None:
    pool_tokens = 20 * 32
    check_request(config, params(4), 2 * pool_tokens // 2 - 4)
    check_request(config, params(4), pool_tokens + 100)  # evicted between chunks, so it does fit
    check_request(config, params(4, deltamem_policy="off"), pool_tokens - 4)
    with pytest.raises(RequestRefused, match="needs up to 21 KV-cache blocks at once.*the pool has 20"):
        check_request(config, params(5, deltamem_policy="off"), pool_tokens - 4)
    assert heard == ["does_not_fit"]


def test_the_pool_of_one_data_parallel_engine_counts(config: VllmConfig) -> None:
    two = copy.deepcopy(config)
    object.__setattr__(two.parallel_config, "data_parallel_size", 2)
    two.cache_config.num_gpu_blocks = 42  # vLLM adds up the engines' pools
    with pytest.raises(RequestRefused, match="the pool has 20"):
        check_request(two, params(5, deltamem_policy="off"), 20 * 32 - 4)


def test_installing_again_changes_nothing() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    request_validation.install()
    before = (AsyncLLM.generate, InputProcessor.process_inputs)
    request_validation.install()
    assert (AsyncLLM.generate, InputProcessor.process_inputs) == before
