# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Requests that cannot be served as asked are refused in the front end, before anything is queued.

Two seams, one check. `InputProcessor.process_inputs` sees every request, online and offline, with its final
prompt and token limit. `AsyncLLM.generate` is an async generator, which runs only once a response streams;
checking when it is called turns the refusal into a plain HTTP 400 for streamed requests too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from deltamem_vllm.config import DeltaMemConfig, is_active
from deltamem_vllm.integration import ledger
from deltamem_vllm.memory.admission import peak_blocks
from deltamem_vllm.memory.budgets import budget_for
from deltamem_vllm.memory.events import RefusalLog
from deltamem_vllm.request_options import (
    KEEP_RATIO,
    KEEP_TOKENS,
    KEYS,
    POLICY,
    RequestOptionError,
    RequestOptions,
    own_args,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REASONS = ("policy_inactive", "bad_option", "streaming_session", "prompt_logprobs", "does_not_fit")
"""Every reason that `on_refused` hears."""

on_refused: list[Callable[[str], None]] = []
"""Called with one of `REASONS` for each refused request, in the process that refuses it."""

# Nothing is shown of it while the policy is off.
refusals = RefusalLog(reason for reason in REASONS if reason != "policy_inactive")
"""What this process refused."""


class RequestRefused(VLLMValidationError, ValueError):
    """A request that is not served. vLLM's servers answer 400 with the message; offline a ValueError."""

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter, value=value)


def install() -> None:
    """Check requests in this process from now on. Safe to call again."""
    ledger.apply("vllm.v1.engine.input_processor:InputProcessor.process_inputs", _make_process_inputs)
    ledger.apply("vllm.v1.engine.async_llm:AsyncLLM.generate", _make_generate)


def check_request(vllm_config: VllmConfig, params: Any, prompt_len: int | None = None, resumable: bool = False) -> None:
    """Raise `RequestRefused` if the request cannot be served as asked.

    Parameters
    ----------
    vllm_config
        The configuration of the engine that would serve it.
    params
        ``SamplingParams``, or ``PoolingParams``, which the policy does not concern.
    prompt_len
        Tokens of the prompt; None where it is not known yet (what depends on it is checked later).
    resumable
        Part of a streaming input session.
    """
    if not isinstance(params, SamplingParams):
        return
    if not is_active(vllm_config.additional_config):
        for key, value in own_args(params.extra_args).items():
            _refuse(
                "policy_inactive",
                f"{key} was given, but this server runs without the deltamem policy; leave it out, or "
                "start the server with --kv-cache-policy deltamem",
                key,
                value,
            )
        return
    config = DeltaMemConfig.from_additional_config(vllm_config.additional_config)
    try:
        options = RequestOptions.from_extra_args(params.extra_args, config)
    except RequestOptionError as error:
        _refuse("bad_option", str(error), error.key, error.value)
    keep_all = f'send "{POLICY}": "off" in vllm_xargs to keep the whole request'
    if resumable and options.enabled:
        _refuse("streaming_session", f"streaming input sessions are not served with eviction; {keep_all}")
    if prompt_len is None:
        return
    budget = budget_for(options, config)
    if params.prompt_logprobs is not None and budget is not None:
        least = budget.least_tokens(prompt_len, vllm_config.cache_config.block_size)
        if least < prompt_len:
            # In either mode tokens may be evicted between two chunks of the prompt, and later ones then see less
            # context.
            _refuse(
                "prompt_logprobs",
                f"prompt_logprobs of a prompt of {prompt_len} tokens, of which only {least} are sure to stay "
                f"({_budget_in_words(options)}), may differ from the model's own; {keep_all}",
                "prompt_logprobs",
            )
    if params.max_tokens is not None:
        check_fits(options, prompt_len, params.max_tokens, vllm_config)


def check_fits(options: RequestOptions, prompt_len: int, max_tokens: int, vllm_config: VllmConfig) -> None:
    """Raise `RequestRefused` if the request would need more blocks at once than the pool has.

    Without this it would wait for ever: vLLM sizes the pool for the longest request, but with the policy on a
    pool may be smaller than that.
    """
    total = vllm_config.cache_config.num_gpu_blocks
    if not total:
        return  # The engine has not reported its pool yet; requests only arrive after it did.
    # vLLM adds up the pools of all data-parallel engines; one block of each is its null block.
    pool = total // vllm_config.parallel_config.data_parallel_size - 1
    need = peak_blocks(
        budget_for(options, DeltaMemConfig.from_additional_config(vllm_config.additional_config)),
        prompt_len=prompt_len,
        max_new_tokens=max_tokens,
        block_size=vllm_config.cache_config.block_size,
        chunk_tokens=vllm_config.max_in_flight_tokens,
        max_model_len=vllm_config.model_config.max_model_len,
    )
    if need > pool:
        _refuse(
            "does_not_fit",
            f"prompt of {prompt_len} tokens with max_tokens={max_tokens} needs up to {need} KV-cache blocks "
            f"at once (policy {_budget_in_words(options)}), the pool has {pool}; shorten the prompt, lower "
            f"max_tokens, {_less_memory(options)}, or give the server more KV memory",
            "max_tokens",
        )


def _budget_in_words(options: RequestOptions) -> str:
    if not options.enabled:
        return "off"
    kept = f"keep_ratio={options.keep_ratio}" if options.keep_tokens is None else f"keep_tokens={options.keep_tokens}"
    return f"on, {kept}, min_tokens={options.min_tokens}"


def _less_memory(options: RequestOptions) -> str:
    if not options.enabled:
        return f"do without {POLICY}=off"
    return f"lower {KEEP_RATIO if options.keep_tokens is None else KEEP_TOKENS}"


def _refuse(reason: str, message: str, parameter: str | None = None, value: object = None) -> NoReturn:
    for listener in on_refused:
        listener(reason)
    # Of an option neither its value nor a name that we do not know: clients write them. Other messages hold numbers.
    detail = message if reason != "bad_option" else parameter if parameter in KEYS else "an option that is not known"
    refusals.add(reason, detail)
    raise RequestRefused(message, parameter=parameter, value=value)


def _make_process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        length = _prompt_len(request.prompt_token_ids, request.prompt_embeds)
        check_request(self.vllm_config, request.sampling_params, length, request.resumable)
        return request

    return process_inputs


def _make_generate(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        length = None
        if isinstance(prompt, dict):
            length = _prompt_len(prompt.get("prompt_token_ids"), prompt.get("prompt_embeds"))
        check_request(self.vllm_config, sampling_params, length)
        return original(self, prompt, sampling_params, *args, **kwargs)

    return generate


def _prompt_len(token_ids: Any, embeds: Any) -> int | None:
    for prompt in (token_ids, embeds):
        if prompt is not None:
            return len(prompt)
    return None
