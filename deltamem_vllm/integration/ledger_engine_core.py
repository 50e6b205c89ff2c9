# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The ledger's entries of the engine core: scheduler and blocks."""

from deltamem_vllm.integration.ledger import Patch

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_MANAGER = "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"
_REGISTRY = "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry"

_LOGICAL = "an official notion of resident length beside the logical one"

ENGINE_CORE: tuple[Patch, ...] = (
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
)
