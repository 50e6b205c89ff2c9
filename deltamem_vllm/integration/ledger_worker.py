# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The ledger's entries of worker processes: both model runners, and attention."""

from deltamem_vllm.integration.ledger import Patch

_GPU_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_CPU_WORKER = "vllm.v1.worker.cpu_worker:CPUWorker"
_MODEL_STATE = "vllm.v1.worker.gpu.model_states.default:DefaultModelState"

_LOGICAL = "an official notion of resident length beside the logical one"

WORKER: tuple[Patch, ...] = (
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
