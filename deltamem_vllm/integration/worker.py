# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The worker: runs a step's compactions, then vLLM's own forward pass with resident lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.dealing.dealer import Dealer
from deltamem_vllm.dealing.pool import PagePool
from deltamem_vllm.dealing.rater import Rater
from deltamem_vllm.dealing.tables import PageTables
from deltamem_vllm.integration import backends, spec
from deltamem_vllm.integration.calibrations import bind_scorers, find_calibration, rank_prior
from deltamem_vllm.integration.compactor import Compactor
from deltamem_vllm.integration.dealt_batch import DealtBatch
from deltamem_vllm.integration.dealt_read import READERS, ReadsDealtPages
from deltamem_vllm.integration.layers_view import tokens_by_pair
from deltamem_vllm.integration.paged_attention import cold_tier, install_kernel
from deltamem_vllm.integration.refusals import check_supported
from deltamem_vllm.integration.resident import ResidentRows, StepState
from deltamem_vllm.integration.runner_v1 import RunnerV1Hooks
from deltamem_vllm.integration.runner_v2 import RunnerV2Hooks
from deltamem_vllm.memory.budgets import cdiv
from deltamem_vllm.memory.curves import UtilityCurve
from deltamem_vllm.memory.plans import StepPlan
from deltamem_vllm.ops.dealt_pages import DealtPages
from deltamem_vllm.ops.huge_pages import prefer_huge_pages
from deltamem_vllm.ops.layout import probe_layout
from deltamem_vllm.ops.pages import PageMover
from deltamem_vllm.scoring.registry import load_scorer
from deltamem_vllm.scoring.window import ObservationWindow

logger = init_logger("vllm.deltamem")

# Before vLLM builds the model: layers pick their attention implementation when they are constructed.
backends.register()
spec.register()


class WorkerMemory:
    """Everything deltamem holds in one worker.

    Parameters
    ----------
    vllm_config: of the engine.
    runner: the worker's model runner, KV cache initialised.
    """

    def __init__(self, vllm_config: Any, runner: Any) -> None:
        config = DeltaMemConfig.from_additional_config(vllm_config.additional_config)
        scorers = {name: load_scorer(name) for name in config.scorers}
        layers = attention_layers(vllm_config, runner.kv_cache_config)
        caches = [layer.kv_cache for layer in layers]
        _ask_for_huge_pages(caches)
        self._shape = len(caches), caches[0].shape[1]
        max_requests, max_tokens = batch_limits(vllm_config)
        device = caches[0].device
        calibration = find_calibration(vllm_config, config)
        bind_scorers(calibration, scorers.values(), len(caches), caches[0].shape[1], device)
        self.window: ObservationWindow | None = None
        observing = [name for name, scorer in scorers.items() if scorer.needs_queries]
        if observing:
            _check_observed(layers, observing[0])
            heads = [(layer.impl.num_heads, layer.impl.head_size) for layer in layers]
            dtype = vllm_config.model_config.dtype
            window = max(scorer.observed(config.window) for scorer in scorers.values())
            self.window = ObservationWindow(window, max_requests, max_tokens, heads, dtype, device)
            for layer, ring in zip(layers, self.window.rings, strict=True):
                layer.impl.deltamem_ring = ring
        layout = probe_layout(_writer(layers[0]), caches[0])
        scales = [float(layer.impl.scale) for layer in layers]
        self.dealt: DealtBatch | None = None
        dealer: Dealer | None = None
        if config.dealing != "equal":
            _check_readable(layers)
            _check_no_sinks(layers)
            tables = make_tables(vllm_config, PagePool(caches))
            self.dealt = DealtBatch(tables, has_graphs(vllm_config), vllm_config.model_config.max_model_len)
            _install_tables(vllm_config, caches)
            prior = rank_prior(calibration, tables.pool) if calibration is not None else None
            mover = DealtPages(layout)
            cold = cold_tier(config, tables.pool, layout)
            coded = None if cold is None else cold.layout
            install_kernel(layers, coded, layout, tables.pool)
            rater = Rater(tables, mover, scales, self.window, config.redundancy, config.seed, coded)
            dealer = Dealer(tables, mover, rater, prior, cold)
        self.compactor = Compactor(caches, scales, PageMover(layout), scorers, self.window, config.seed, dealer)
        state = StepState(ResidentRows(max_requests, max_tokens, device), self.window, self.dealt)
        hooks = RunnerV2Hooks if is_v2(runner) else RunnerV1Hooks
        self.hooks: RunnerV1Hooks | RunnerV2Hooks = hooks(runner, state)
        self._curves: dict[str, UtilityCurve] = {}

    def run_step(self, output: Any) -> None:
        """Compactions first: vLLM's own state update may hand their source blocks to other requests."""
        if self.dealt is not None:
            self.dealt.begin(output)
            self.compactor.forget(output.deltamem.dealt)
        for probe in output.deltamem.probes:
            self._curves[probe.request_id] = self.compactor.probe(probe)
        for plan in output.deltamem.compactions:
            self.compactor.run(plan)
        if self.dealt is not None:
            self.dealt.tables.keep_only(output.deltamem.dealt)
        self.hooks.begin_step(output)

    def tokens_by_pair(self, request_id: str, serial: int, resident: int) -> dict[str, list[list[float]]]:
        """What each (layer, kv head) of a running request holds; see `layers_view`."""
        tables = None if self.dealt is None else self.dealt.tables
        return tokens_by_pair(tables, self._shape, request_id, serial, resident)

    def take_report(self) -> dict[str, Any]:
        """What the scheduler reads off the step's output: news since the last call, by attribute."""
        curves, self._curves = self._curves, {}
        return {
            "deltamem_timings": self.compactor.take_timings(),
            "deltamem_curves": curves,
            "deltamem_cold": self.compactor.take_cold(),
        }


class DeltaMemWorkerMixin:
    """Adds compaction to a vLLM worker."""

    if TYPE_CHECKING:  # provided by vLLM's worker
        vllm_config: Any
        model_runner: Any

    deltamem: WorkerMemory | None = None

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()  # type: ignore[misc]
        check_supported(self.vllm_config, kv_cache_specs=specs)
        return spec.convert(specs)

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: what vLLM found free, less the observation window and the page tables."""
        available: int = super().determine_available_memory()  # type: ignore[misc]
        window, tables = window_bytes(self.vllm_config), table_bytes(self.vllm_config)
        if window + tables >= available:
            raise ValueError(
                f"the observation window needs {window} bytes and the page tables {tables}, but only {available} are "
                "free for the KV cache. Lower --max-num-seqs, --max-model-len or --deltamem-config.window, or choose a "
                "scorer that needs no queries."
            )
        return available - window - tables

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]
        check_supported(self.vllm_config, model_runner=self.model_runner)
        self.deltamem = WorkerMemory(self.vllm_config, self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        memory = self.deltamem
        if memory is None:  # no KV cache yet
            return super().execute_model(scheduler_output)  # type: ignore[misc]
        if not hasattr(scheduler_output, "deltamem"):
            scheduler_output.deltamem = StepPlan()  # vLLM's kernel warm-up makes its own steps
        memory.run_step(scheduler_output)
        try:
            output = super().execute_model(scheduler_output)  # type: ignore[misc]
        finally:
            memory.hooks.end_step()
        return self._with_report(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_report(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def deltamem_layers(self, request_id: str, serial: int, resident: int) -> dict[str, list[list[float]]]:
        """Asked by the engine, between two steps, what this rank holds of a running request."""
        assert self.deltamem is not None, "requests run only once there is a KV cache"
        return self.deltamem.tokens_by_pair(request_id, serial, resident)

    def _with_report(self, output: Any) -> Any:
        """Send timings, utility curves and tiers to the scheduler: the step's output is pickled with its attributes."""
        memory = self.deltamem
        if memory is None:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            wait, report = output.get_output, memory.take_report()
            output.get_output = lambda: _reported(wait(), report)  # type: ignore[method-assign]
        elif isinstance(output, ModelRunnerOutput):
            _reported(output, memory.take_report())
        return output


def _reported(output: ModelRunnerOutput, report: dict[str, Any]) -> ModelRunnerOutput:
    for name, value in report.items():
        setattr(output, name, value)
    return output


def _ask_for_huge_pages(caches: Sequence[Tensor]) -> None:
    """On a CPU, for the allocations behind the layers' caches; vLLM has just made them, of zeros."""
    if not caches[0].is_cpu:
        return
    memories = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches}.values()
    given = sum(prefer_huge_pages(torch.empty(0, dtype=torch.uint8).set_(memory)) for memory in memories)
    size = sum(memory.nbytes() for memory in memories)
    logger.info(
        "deltamem: huge pages hold %.2f of the KV cache's %.2f GiB, as far as the kernel has free ones",
        given / 2**30,
        size / 2**30,
    )


def has_graphs(vllm_config: Any) -> bool:
    """Whether whole steps, attention included, may be replayed from captured graphs."""
    mode = vllm_config.compilation_config.cudagraph_mode
    return current_platform.device_type != "cpu" and bool(mode is not None and mode.has_full_cudagraphs())


def make_tables(vllm_config: Any, pool: PagePool) -> PageTables:
    """Page tables for the largest batch."""
    width = cdiv(vllm_config.model_config.max_model_len, pool.block_size) + 1
    cold = DeltaMemConfig.from_additional_config(vllm_config.additional_config).has_cold
    return PageTables(pool, batch_limits(vllm_config)[0], width, has_graphs(vllm_config), cold)


def table_bytes(vllm_config: Any) -> int:
    """Bytes the page tables take on this rank's device from the start; tables that grow come out of free memory."""
    config = DeltaMemConfig.from_additional_config(vllm_config.additional_config)
    if config.dealing == "equal" or not has_graphs(vllm_config):
        return 0
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    width = cdiv(model.max_model_len, vllm_config.cache_config.block_size) + 1
    pairs = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel)
    cold = width + 1 if config.has_cold else 0
    return int(batch_limits(vllm_config)[0] * pairs * (width + 2 + cold) * 4)


def _install_tables(vllm_config: Any, caches: list[torch.Tensor]) -> None:
    """Tell every attention layer which tables are its own; layers that share a cache share them."""
    index = {cache.data_ptr(): i for i, cache in enumerate(caches)}
    for layer in vllm_config.compilation_config.static_forward_context.values():
        cache = getattr(layer, "kv_cache", None)
        if isinstance(cache, torch.Tensor) and cache.data_ptr() in index:
            layer.impl.install_page_tables(index[cache.data_ptr()])


def _check_readable(layers: list[Any]) -> None:
    blind = sorted({type(layer.impl).__name__ for layer in layers if not isinstance(layer.impl, ReadsDealtPages)})
    if blind:
        raise ValueError(
            f"dealt pages cannot be read by the attention implementation in use: found {', '.join(blind)}; supported "
            f"backends: {', '.join(READERS)}. Choose one with --attention-backend, or keep the same number of tokens "
            "in every head with --deltamem-config.dealing equal."
        )


def _check_no_sinks(layers: list[Any]) -> None:
    """Learned sinks are numbered by query head; where every (request, kv head) is a sequence, all would get the first
    heads'."""
    found = sum(getattr(layer.impl, "sinks", None) is not None for layer in layers)
    if found:
        raise ValueError(
            f"dealt pages cannot be read with learned attention sinks: found in {found} of {len(layers)} layers; "
            "supported: attention without them. Keep the same number of tokens in every head with "
            "--deltamem-config.dealing equal."
        )


def is_v2(runner: Any) -> bool:
    """Whether a model runner is Model Runner V2."""
    return hasattr(runner, "model_state")


def attention_layers(vllm_config: Any, kv_cache_config: KVCacheConfig) -> list[Any]:
    """vLLM's attention layers that own a KV cache, in model order, each cache once."""
    context = vllm_config.compilation_config.static_forward_context
    seen: set[int] = set()
    layers = []
    for group in kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            layer = context[name]
            if layer.kv_cache.data_ptr() not in seen:
                seen.add(layer.kv_cache.data_ptr())
                layers.append(layer)
    return layers


def batch_limits(vllm_config: Any) -> tuple[int, int]:
    """Most requests and most tokens of one batch, padding for captured graphs included."""
    scheduler = vllm_config.scheduler_config
    captured = max(vllm_config.compilation_config.cudagraph_capture_sizes or [0])
    return max(scheduler.max_num_seqs, captured), max(scheduler.max_num_batched_tokens, captured)


def window_bytes(vllm_config: Any) -> int:
    """Bytes the observation window takes on this rank."""
    config = DeltaMemConfig.from_additional_config(vllm_config.additional_config)
    window = max(load_scorer(name).observed(config.window) for name in config.scorers)
    if not window:
        return 0
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    per_query = model.get_num_attention_heads(parallel) * model.get_head_size() * model.dtype.itemsize
    rows = batch_limits(vllm_config)[0] * window + 1
    return int(rows * per_query * model.get_num_layers(parallel))


def _check_observed(layers: list[Any], scorer: str) -> None:
    blind = sorted(
        {type(layer.impl).__name__ for layer in layers if not isinstance(layer.impl, backends.ObservesQueries)}
    )
    if blind:
        raise ValueError(
            f"scorer {scorer!r} reads recent queries, but the attention implementation in use does not record them: "
            f"found {', '.join(blind)}; supported backends: {', '.join(backends.OBSERVED)}. Choose one with "
            "--attention-backend, or a scorer that needs no queries (`deltamem scorers` lists them)."
        )


def _writer(layer: Any) -> Any:
    def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
        layer.impl.do_kv_cache_update(layer, key, value, cache, slots)

    return write


if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker

    class DeltaMemCPUWorker(DeltaMemWorkerMixin, CPUWorker):
        """vLLM's CPU worker with compaction."""
else:
    from vllm.v1.worker.gpu_worker import Worker

    class DeltaMemGPUWorker(DeltaMemWorkerMixin, Worker):
        """vLLM's GPU worker with compaction."""
