# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The telemetry of the engines at vLLM's `/metrics`.

vLLM builds `DeltaMemStatLogger` in every API server that runs with the policy (see `engine_args.py`).

Why counters add up with several API servers: `Scheduler.update_from_output` (vLLM 0.32) attaches the
stats of a step to exactly one of its outputs ("Return stats to only one of the front-ends"), so each
drained delta arrives in exactly one process. prometheus_client then sums counters over processes, and
takes of each gauge the value that was set last ("mostrecent"), which is the newest state of that engine
whichever process heard it. Labels come from the index of the engine that sent the stats.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from vllm.config import ModelConfig, VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from deltamem_vllm import __version__
from deltamem_vllm.config import CONFIG_KEY, is_active
from deltamem_vllm.telemetry import CARRIER_PREFIX, METRICS, Metric, decode, metric, share

logger = logging.getLogger(__name__)

Collector = Counter | Gauge | Histogram

POLICY_INFO = "deltamem_policy_info"
# Older than any real update but not 0: prometheus_client drops "mostrecent" samples with timestamp 0.
_BEFORE_ANY_UPDATE = 1e-3


class Exporter:
    """Prometheus collectors for one model server process.

    Parameters
    ----------
    model_name : str
        Label of every series, as in vLLM's own metrics.
    engines : sequence of int
        Engines whose series exist, as zeros, before the first update.
    config : mapping
        The resolved `DeltaMemConfig`, shown as labels of `deltamem_policy_info`.
    registry : CollectorRegistry
        Where the collectors live. In multi-process mode values are files and this is only a list of names.
    """

    def __init__(
        self,
        model_name: str,
        engines: Sequence[int],
        config: Mapping[str, Any],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._model_name = model_name
        self._registry = registry
        self._collectors: dict[str, Collector] = {row.key: _collector(row, registry) for row in METRICS}
        facts = {
            "policy": "deltamem",
            "version": __version__,
            **{key: str(config[key]) for key in sorted(config)},
        }
        self._info = Gauge(
            POLICY_INFO,
            "Always 1; the labels say which eviction policy is active and with which settings.",
            ("model_name", "engine", *facts),
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        for engine in engines:
            self._info.labels(model_name, str(engine), *facts.values()).set(1)
            for row in METRICS:
                if row.side == "engine":
                    self._show_zero(row, model_name, str(engine))
        for row in METRICS:
            if row.side == "api_server":
                self._show_zero(row, model_name)

    def record(self, row: Metric, label: str | None, amount: int, engine: int) -> None:
        """Apply one number of a drained telemetry: the growth of a counter or histogram, or a level's new value."""
        if row.kind == "histogram":
            assert label is not None, "a histogram travels by permille"
            histogram = self._child(row, self._model_name, str(engine))
            assert isinstance(histogram, Histogram)
            for _ in range(amount):
                histogram.observe(share(int(label)))
            return
        child = self._child(row, self._model_name, str(engine), *(() if label is None else (label,)))
        assert not isinstance(child, Histogram)
        if isinstance(child, Counter):
            child.inc(row.public_value(amount))
        else:
            child.set(row.public_value(amount))

    def count_refused(self, reason: str) -> None:
        """Count a request that this process refused."""
        refused = self._child(metric("requests_refused"), self._model_name, reason)
        assert isinstance(refused, Counter)
        refused.inc()

    def close(self) -> None:
        """Free the metric names for the next exporter in this process."""
        for collector in (*self._collectors.values(), self._info):
            self._registry.unregister(collector)

    def _child(self, row: Metric, *labels: str) -> Collector:
        return self._collectors[row.key].labels(*labels)

    def _show_zero(self, row: Metric, *labels: str) -> None:
        for label in ((),) if row.label is None else ((value,) for value in row.initial):
            child = self._child(row, *labels, *label)
            if isinstance(child, Gauge):
                # Gauge.set() would stamp this zero with the present, and an API server that starts late
                # would hide what another one has already heard from the engine.
                child._value.set(0.0, timestamp=_BEFORE_ANY_UPDATE)


def _collector(row: Metric, registry: CollectorRegistry) -> Collector:
    if row.kind == "counter":
        return Counter(row.public_name, row.help, row.labels, registry=registry)
    if row.kind == "histogram":
        return Histogram(row.public_name, row.help, row.labels, registry=registry, buckets=row.buckets)
    return Gauge(row.public_name, row.help, row.labels, registry=registry, multiprocess_mode="mostrecent")


class DeltaMemStatLogger(AggregateStatLoggerBase):
    """Feeds the `Exporter` from vLLM's scheduler stats; does nothing when the policy is not asked for.

    An aggregate logger: vLLM builds one per process for all engines, where a plain `StatLoggerBase` is
    built once per engine and would register each name several times.
    """

    # vLLM may build several engines in one process after each other (tests do); names are process-wide.
    _live: Exporter | None = None

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._exporter: Exporter | None = None
        self._reported: set[str] = set()
        config = resolved_config(vllm_config)
        if config is None:
            return
        # vLLM loads stat loggers in every server; without the flag nothing of ours may be imported for it.
        from deltamem_vllm.integration import request_validation

        previous = DeltaMemStatLogger._live
        if previous is not None:
            previous.close()
            request_validation.on_refused.remove(previous.count_refused)
        self._exporter = Exporter(model_name(vllm_config.model_config), engine_indexes, config)
        request_validation.on_refused.append(self._exporter.count_refused)
        DeltaMemStatLogger._live = self._exporter

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Take our numbers out of the stats of one step."""
        if self._exporter is None or scheduler_stats is None:
            return
        carrier = scheduler_stats.num_kv_fetch_reqs_by_stage
        for name in [name for name in carrier if name.startswith(CARRIER_PREFIX)]:
            # Taken out, not read: vLLM's own logger comes after us and would report "KV fetch" for them.
            amount = carrier.pop(name)
            try:
                decoded = decode(name)
            except KeyError:
                # An engine on another machine may run another deltamem; serving must not stop for a metric.
                if name not in self._reported:
                    self._reported.add(name)
                    logger.error(
                        "Engine %d sent %r, unknown to deltamem %s; install the same version everywhere",
                        engine_idx,
                        name,
                        __version__,
                    )
                continue
            if decoded is not None:
                self._exporter.record(*decoded, amount, engine_idx)

    def log_engine_initialized(self) -> None:
        """Nothing to do: the series exist since construction."""


def model_name(model_config: ModelConfig) -> str:
    """Return the `model_name` label: vLLM reduced the served names to the first one by now."""
    name = model_config.served_model_name
    assert isinstance(name, str), f"ModelConfig.served_model_name is not resolved: {name!r}"
    return name


def resolved_config(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """Return the policy's resolved config, or None when it is not asked for."""
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or not is_active(additional):
        return None
    return dict(additional[CONFIG_KEY])
