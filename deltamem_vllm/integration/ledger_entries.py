# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The entries of the patch ledger, in the order in which a step passes through them (see ledger.py)."""

from deltamem_vllm.integration.ledger import Patch

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_REGISTRY = "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry"
_GPU_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_CPU_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
_MODEL_STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"
_ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"

_LOGICAL = "an official notion of resident length beside the logical one"
_FLAG_API = "a plugin API for engine arguments"
_ADMISSION_API = "an official per-request admission hook"

LEDGER: tuple[Patch, ...] = (
    # Flags and requests, in the front-end process.
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
    # Scheduler, in the engine core.
    Patch(
        f"{_SCHEDULER}.__init__",
        "subclassed",
        "finds our block manager and the policy",
        "scheduler plugins with documented state",
        "self, vllm_config, kv_cache_config, structured_output_manager, block_size, hash_block_size, "
        "mm_registry, include_finished_set, log_stats",
    ),
    Patch(
        f"{_SCHEDULER}.add_request",
        "subclassed",
        "reads the request's own options",
        "an event for new requests",
        "self, request",
    ),
    Patch(
        f"{_SCHEDULER}._free_request",
        "subclassed",
        "forgets them",
        "a per-request end event",
        "self, request, delay_free_blocks",
    ),
    Patch(
        f"{_SCHEDULER}.schedule",
        "subclassed",
        "plans compactions before the step is filled, and attaches them to it",
        "a hook before scheduling, with an extension field in SchedulerOutput",
        "self, throttle_prefills",
    ),
    Patch(
        f"{_SCHEDULER}.update_from_output",
        "subclassed",
        "takes the worker's timings back",
        "an extension field in ModelRunnerOutput",
        "self, scheduler_output, model_runner_output",
    ),
    Patch(
        f"{_SCHEDULER}._preempt_request",
        "subclassed",
        "counts preempted requests that had been compacted",
        "a preemption event",
        "self, request, timestamp, drop_stale_output",
    ),
    Patch(
        f"{_SCHEDULER}.make_stats",
        "subclassed",
        "sends our numbers along with vLLM's",
        "an extension field in SchedulerStats",
        "self, spec_decoding_stats, kv_connector_stats, cudagraph_stats, perf_stats, ec_connector_stats",
    ),
    Patch(
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule",
        "used",
        "counts tokens in flight as computed, which plans rely on",
        "a documented count of tokens in flight",
        "self, scheduler_output",
    ),
    Patch(
        "vllm.v1.metrics.stats:SchedulerStats.num_kv_fetch_reqs_by_stage",
        "used",
        "a str -> int field that crosses processes; our keys in it carry a prefix",
        "an extension field in SchedulerStats",
        None,
    ),
    # Blocks, in the engine core.
    Patch(
        f"{_REGISTRY}._ensure_registered",
        "used",
        "vLLM registers its own specs only while the registry is empty",
        "registration that does not depend on order",
        "vllm_config",
    ),
    Patch(
        f"{_REGISTRY}.register",
        "used",
        "names the block manager of our spec",
        "nothing: it is meant for this",
        "kvcache_spec_cls, manager_class, uniform_type_base_spec",
    ),
    Patch(
        "vllm.v1.kv_cache_interface:FullAttentionSpec.max_memory_usage_bytes",
        "subclassed",
        "one request of max_model_len needs less than its logical length",
        _LOGICAL,
        "self, vllm_config",
    ),
    Patch(
        f"{_MANAGER}.get_num_blocks_to_allocate",
        "subclassed",
        "resident instead of logical tokens, and the block reserve",
        _LOGICAL,
        "self, request_id, num_tokens, new_computed_blocks, total_computed_tokens, "
        "num_local_computed_tokens, num_tokens_main_model, apply_admission_cap, prefill_end",
    ),
    Patch(
        f"{_MANAGER}.allocate_new_blocks",
        "subclassed",
        "resident instead of logical tokens",
        _LOGICAL,
        "self, request_id, num_tokens, num_tokens_main_model",
    ),
    Patch(
        f"{_MANAGER}.cache_blocks",
        "subclassed",
        "blocks of a compacted request are never hashed",
        "a per-request switch for prefix caching that can change",
        "self, request, num_tokens, retention_interval, replay_boundaries",
    ),
    Patch(
        f"{_MANAGER}.pop_blocks_for_free",
        "subclassed",
        "finish, abort and preemption all forget the compaction here",
        "a per-request end event",
        "self, request_id",
    ),
    Patch(
        f"{_POOL}.get_new_blocks",
        "used",
        "fresh blocks for the survivors",
        "a public block API",
        "self, num_blocks",
    ),
    Patch(f"{_POOL}.free_blocks", "used", "returns the old blocks", "a public block API", "self, ordered_blocks"),
    Patch(f"{_POOL}.get_num_free_blocks", "used", "room for the copy", "a public block API", "self"),
    Patch(f"{_POOL}.is_block_writable", "used", "whether a block has a hash", "as above", "self, block"),
    Patch(
        f"{_POOL}.evict_blocks",
        "used",
        "takes the hash of blocks that are packed in place",
        "as above",
        "self, block_ids",
    ),
    # Worker processes.
    Patch(f"{_GPU_WORKER}.get_kv_cache_spec", "subclassed", "asks for our block manager", "none planned", "self"),
    Patch(
        f"{_GPU_WORKER}.initialize_from_config",
        "subclassed",
        "installs the runner hooks before graphs are captured",
        "a worker extension that may wrap methods",
        "self, kv_cache_config",
    ),
    Patch(
        f"{_GPU_WORKER}.determine_available_memory",
        "subclassed",
        "leaves room for the observation window",
        "a declaration of extra memory",
        "self",
    ),
    Patch(
        f"{_CPU_WORKER}.determine_available_memory",
        "subclassed",
        "as on the GPU",
        "as on the GPU",
        "self",
    ),
    Patch(
        f"{_GPU_WORKER}.execute_model",
        "subclassed",
        "runs compactions before the runner updates its state",
        "a hook before the step",
        "self, scheduler_output",
    ),
    Patch(
        f"{_GPU_WORKER}.sample_tokens",
        "subclassed",
        "hands timings back with the sampled tokens",
        "an extension field in ModelRunnerOutput",
        "self, grammar_output",
    ),
    Patch(f"{_CPU_WORKER}.get_kv_cache_spec", "subclassed", "as on the GPU", "as on the GPU", "self"),
    Patch(
        f"{_CPU_WORKER}.initialize_from_config",
        "subclassed",
        "as on the GPU",
        "as on the GPU",
        "self, kv_cache_config",
    ),
    Patch(
        f"{_CPU_WORKER}.execute_model",
        "subclassed",
        "as on the GPU",
        "as on the GPU",
        "self, scheduler_output",
    ),
    Patch(f"{_CPU_WORKER}.sample_tokens", "subclassed", "as on the GPU", "as on the GPU", "self, grammar_output"),
    # Model Runner V1.
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
        "wrapped",
        "replaces the block-table row of a compacted request after the runner's own update",
        "block lists that may be replaced in SchedulerOutput without resuming",
        "self, scheduler_output",
    ),
    Patch(
        "vllm.v1.worker.block_table:MultiGroupBlockTable.add_row",
        "used",
        "writes that row",
        "as above",
        "self, block_ids, row_idx",
    ),
    Patch(
        "vllm.v1.worker.block_table:MultiGroupBlockTable.compute_slot_mapping",
        "wrapped",
        "new tokens are written at their resident index",
        _LOGICAL,
        "self, num_reqs, query_start_loc, positions",
    ),
    Patch(
        "vllm.v1.worker.block_table:BlockTable.compute_slot_mapping",
        "used",
        "what the table above calls with the positions we give it",
        _LOGICAL,
        "self, num_reqs, query_start_loc, positions",
    ),
    Patch(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        "wrapped",
        "attention reads resident lengths",
        _LOGICAL,
        "self, common_prefix_len, common_attn_metadata, fast_build",
    ),
    # Model Runner V2.
    Patch(
        f"{_MODEL_STATE}.preprocess_state",
        "subclassed",
        "new tokens are written at their resident index",
        _LOGICAL,
        "self, input_batch, block_tables, kv_cache_config, num_computed_tokens",
    ),
    Patch(
        f"{_MODEL_STATE}.prepare_attn",
        "subclassed",
        "attention reads resident lengths",
        _LOGICAL,
        "self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, "
        "for_capture, ubatch_idx, model_specific_attn_metadata",
    ),
    Patch(
        "vllm.v1.worker.gpu.block_table:BlockTables.append_block_ids",
        "used",
        "replaces the block list of a compacted request",
        "as for Model Runner V1",
        "self, req_index, new_block_ids, overwrite",
    ),
    Patch(
        "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
        "used",
        "computed again with resident positions",
        _LOGICAL,
        "self, idx_mapping, query_start_loc, positions, num_tokens_padded, out",
    ),
    # Attention.
    Patch(
        "vllm.v1.attention.backends.registry:register_backend",
        "used",
        "installs the attention seam",
        "nothing: it is meant for this",
        "backend, class_path, is_mamba",
    ),
    Patch(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
        "subclassed",
        "records the observation window, and reads dealt pages: to it they look like a model with one kv head",
        "an official way to observe queries; page tables per layer and kv head",
        "self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale",
    ),
    Patch(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
        "used",
        "writes a probe page, to learn where the backend puts each element",
        "a description of the page layout",
        "self, layer, key, value, kv_cache, slot_mapping",
    ),
    Patch(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata",
        "used",
        "a copy of it describes every (request, kv head) as a sequence",
        "page tables per layer and kv head",
        "num_actual_tokens, max_query_len, query_start_loc, max_seq_len, seq_lens, block_table, slot_mapping, "
        "scheduler_metadata, causal, dynamic_causal, use_sdpa_prefill, num_decode_tokens, sdpa_attn_masks, "
        "sdpa_start_loc, encoder_cache",
    ),
    Patch(
        "vllm._custom_ops:cpu_attn_get_scheduler_metadata",
        "used",
        "divides the work of those sequences among threads",
        "as above",
        "num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, query_start_loc, causal, sliding_window_size, "
        "isa, enable_kv_split, dynamic_causal, kv_cache_dtype",
    ),
    Patch(
        "vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts",
        "subclassed",
        "a page must be one piece of memory, so heads stand outside of tokens",
        "nothing: it is meant for this",
        "",
    ),
    Patch(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward",
        "subclassed",
        "as on the CPU",
        "as on the CPU",
        "self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale",
        requires="cuda",
    ),
    Patch(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update",
        "used",
        "as on the CPU",
        "as on the CPU",
        "self, layer, key, value, kv_cache, slot_mapping",
        requires="cuda",
    ),
    Patch(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward",
        "subclassed",
        "as on the CPU",
        "as on the CPU",
        "self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale",
        requires="cuda",
    ),
    Patch(
        "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadata.scheduler_metadata",
        "used",
        "left out for dealt pages: it was computed for other sequences",
        "page tables per layer and kv head",
        None,
        requires="cuda",
    ),
    Patch(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build",
        "used",
        "its metadata's seq_threshold_3D is None for dealt pages: the split-KV scratch is sized for another batch",
        "page tables per layer and kv head",
        "self, common_prefix_len, common_attn_metadata, fast_build",
        requires="cuda",
    ),
    Patch(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.do_kv_cache_update",
        "used",
        "as on the CPU",
        "as on the CPU",
        "self, layer, key, value, kv_cache, slot_mapping",
        requires="cuda",
    ),
)
