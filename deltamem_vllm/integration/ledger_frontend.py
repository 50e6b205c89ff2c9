# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The ledger's entries of the front-end process: flags and requests."""

from deltamem_vllm.integration.ledger import Patch

_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"

_FLAG_API = "a plugin API for engine arguments"
_ADMISSION_API = "an official per-request admission hook"

FRONTEND: tuple[Patch, ...] = (
    Patch(
        f"{_ENGINE_ARGS}.add_cli_args",
        "patched",
        "adds --kv-cache-policy and --deltamem-config",
        _FLAG_API,
        "parser",
    ),
    Patch(
        f"{_ENGINE_ARGS}.from_cli_args",
        "patched",
        "moves our flags into additional_config for namespaces that another parser made",
        _FLAG_API,
        "args",
    ),
    Patch(
        f"{_ENGINE_ARGS}.create_engine_config",
        "patched",
        "checks the policy and what it is combined with, and sets scheduler_cls and worker_cls",
        _FLAG_API,
        "self, usage_context, headless",
    ),
    Patch(
        "vllm.utils.argparse_utils:FlexibleArgumentParser.parse_known_args",
        "wrapped",
        "joins repeated --additional-config and our flags once all arguments were read",
        _FLAG_API,
        "self, args, namespace",
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "patched",
        "refuses a request that cannot be served before it is queued",
        _ADMISSION_API,
        "self, request_id, prompt, params, supported_tasks, arrival_time, lora_request, tokenization_kwargs, "
        "trace_headers, priority, data_parallel_rank, resumable, session_id, kv_hints",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        "patched",
        "the same check before a streaming response has sent its status line",
        _ADMISSION_API,
        "self, prompt, sampling_params, request_id, prompt_text, lora_request, tokenization_kwargs, "
        "trace_headers, priority, data_parallel_rank, session_id, kv_hints, reasoning_ended, "
        "reasoning_parser_kwargs",
    ),
    Patch(
        "vllm.plugins:load_endpoint_plugins",
        "patched",
        "adds our JSON routes without the environment variable that turns other plugins off",
        "endpoint plugins that load like general ones",
        "supported_tasks",
    ),
    Patch(
        "vllm.v1.engine.async_llm:load_stat_logger_plugin_factories",
        "patched",
        "exports our metrics; an entry point would turn statistics on in servers that run without the policy",
        "stat logger plugins that may decline",
        "",
    ),
    Patch(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async",
        "used",
        "asks each engine for its numbers and requests",
        "a public engine query",
        "self, method, args",
    ),
    Patch(
        "vllm.v1.engine.core:EngineCoreProc._handle_client_request",
        "used",
        "finds the methods we add to EngineCore (deltamem_stats, _requests, _state, _layers) by their names",
        "a public engine query",
        "self, request_type, request",
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore.collective_rpc",
        "used",
        "asks the workers what each layer and head of a request holds",
        "nothing: it is meant for this",
        "self, method, timeout, args, kwargs",
    ),
    Patch(
        "vllm.entrypoints.launchers.launcher:serve_http",
        "used",
        "puts its server at app.state.server, where our event streams see that they must end",
        "an event for plugins when the server shuts down",
        "app, sock, enable_ssl_refresh, peer_loads, uvicorn_kwargs",
    ),
    Patch(
        "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware",
        "used",
        "guards vLLM's own routes with --api-key or VLLM_API_KEY; ours take the same keys",
        "a guard that plugins can put their routes under",
        "args, app, supported_tasks",
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        "used",
        "calls plugin loggers before vLLM's own, which therefore never see our keys",
        "an extension field in SchedulerStats",
        "self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx",
    ),
)
