# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""From counted numbers to what Prometheus scrapes, in process and over several API servers."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.v1.metrics.stats import SchedulerStats

from deltamem_vllm import __version__
from deltamem_vllm.integration import request_validation
from deltamem_vllm.integration.metrics import DeltaMemStatLogger
from deltamem_vllm.telemetry import METRICS, Telemetry, metric

CONFIG = {"mode": "always", "keep_ratio": 0.25, "scorer": "delta"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _vllm_config(additional_config: dict[str, Any]) -> Any:
    return SimpleNamespace(additional_config=additional_config, model_config=SimpleNamespace(served_model_name="tiny"))


@pytest.fixture
def stat_logger() -> Iterator[DeltaMemStatLogger]:
    yield DeltaMemStatLogger(vllm_config=_vllm_config({"deltamem": CONFIG}), engine_indexes=[0, 1])
    live = DeltaMemStatLogger._live
    assert live is not None
    live.close()
    request_validation.on_refused.remove(live.count_refused)
    DeltaMemStatLogger._live = None


def _samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("deltamem_") and not sample.name.endswith("_created")
    }


def _scrape() -> str:
    return generate_latest(get_prometheus_registry()).decode()


def _value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset({"model_name": "tiny", **labels}.items())]


def _step(telemetry: Telemetry) -> SchedulerStats:
    # As the scheduler does it, beside the stages vLLM itself counts there.
    return SchedulerStats(num_kv_fetch_reqs_by_stage={"waiting_to_start": 1, **telemetry.drain()})


def _record(stat_logger: DeltaMemStatLogger, stats: SchedulerStats | None, engine: int) -> None:
    stat_logger.record(scheduler_stats=stats, iteration_stats=None, mm_cache_stats=None, engine_idx=engine)


def _assert_clean(text: str) -> None:
    """Run promtool over our part of a scrape."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package: prometheus)")
    ours = "".join(f"{line}\n" for line in text.splitlines() if "deltamem_" in line)
    assert "deltamem_compactions_total" in ours
    checked = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_every_series_is_there_before_the_first_request(stat_logger: DeltaMemStatLogger) -> None:
    samples = _samples(_scrape())
    for row in METRICS:
        if row.label is None or row.initial:
            series = [value for (name, _), value in samples.items() if name == row.public_name]
            engines = 2 if row.side == "engine" else 1
            if row.kind == "histogram":
                series = [value for (name, _), value in samples.items() if name == f"{row.public_name}_bucket"]
                assert series == [0.0] * engines * (len(row.buckets) + 1)
                continue
            assert series == [0.0] * engines * len(row.initial or (None,)), row.public_name
    facts = {key: str(value) for key, value in CONFIG.items()}
    for engine in "01":
        info = {"engine": engine, "policy": "deltamem", "version": __version__, **facts}
        assert _value(samples, "deltamem_policy_info", **info) == 1


def test_deltas_and_levels_of_two_engines(stat_logger: DeltaMemStatLogger) -> None:
    engines = [Telemetry(), Telemetry()]
    for step in range(5):
        for index, telemetry in enumerate(engines):
            telemetry.count("compactions", index + 1)
            telemetry.count("compaction_us", 250_000)
            telemetry.count("skipped", label="no_free_blocks")
            telemetry.level("resident_tokens", 100 * index + step)
            telemetry.level("tier_bytes", 4096 * (index + 1), label="hot")
            _record(stat_logger, _step(telemetry), index)
    _record(stat_logger, None, 0)

    samples = _samples(_scrape())
    for index in range(2):
        engine = str(index)
        assert _value(samples, "deltamem_compactions_total", engine=engine) == 5 * (index + 1)
        assert _value(samples, "deltamem_compaction_seconds_total", engine=engine) == pytest.approx(1.25)
        skipped = _value(samples, "deltamem_compactions_skipped_total", engine=engine, reason="no_free_blocks")
        assert skipped == 5
        assert _value(samples, "deltamem_resident_tokens", engine=engine) == 100 * index + 4
        assert _value(samples, "deltamem_tier_bytes", engine=engine, tier="hot") == 4096 * (index + 1)


def test_scraped_buckets_are_those_of_the_engine(stat_logger: DeltaMemStatLogger) -> None:
    engines = [Telemetry(), Telemetry()]
    for step in range(1, 30):
        for index, telemetry in enumerate(engines):
            telemetry.observe("kept_share", step, 29 * (index + 1))
            if step % 7 == 0:
                _record(stat_logger, _step(telemetry), index)
    for index, telemetry in enumerate(engines):
        _record(stat_logger, _step(telemetry), index)
    samples = _samples(_scrape())
    for index, telemetry in enumerate(engines):
        told = telemetry.totals()["histograms"]["kept_share"]
        assert told["count"] == 29
        engine = str(index)
        assert _value(samples, "deltamem_kept_share_count", engine=engine) == 29
        assert _value(samples, "deltamem_kept_share_sum", engine=engine) == pytest.approx(told["sum"])
        for bound, count in told["buckets"].items():
            assert _value(samples, "deltamem_kept_share_bucket", engine=engine, le=bound) == count


def test_promtool_finds_nothing_to_say(stat_logger: DeltaMemStatLogger) -> None:
    telemetry = Telemetry()
    telemetry.observe("kept_share", 1, 4)
    telemetry.count("skipped", label="no_free_blocks")
    _record(stat_logger, _step(telemetry), 0)
    request_validation.on_refused[-1]("bad_option")
    _assert_clean(_scrape())


def test_our_numbers_are_taken_out_of_the_carrier(stat_logger: DeltaMemStatLogger) -> None:
    """vLLM's own logger would print a "KV fetch" line for any number it finds there."""
    telemetry = Telemetry()
    telemetry.count("compactions")
    stats = _step(telemetry)
    _record(stat_logger, stats, 0)
    assert stats.num_kv_fetch_reqs_by_stage == {"waiting_to_start": 1}


def test_number_of_another_version_is_reported_once_and_the_rest_counts(
    stat_logger: DeltaMemStatLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        carrier = {"deltamem:from_the_future": 3, "deltamem:compactions": 1}
        _record(stat_logger, SchedulerStats(num_kv_fetch_reqs_by_stage=carrier), 0)
    assert _value(_samples(_scrape()), "deltamem_compactions_total", engine="0") == 2
    (reported,) = [record.message for record in caplog.records if "from_the_future" in record.message]
    assert reported.startswith(f"Engine 0 sent 'deltamem:from_the_future', unknown to deltamem {__version__}")


def test_refused_requests_are_counted_without_an_engine(stat_logger: DeltaMemStatLogger) -> None:
    for reason in ("a", "b", "a"):
        for callback in request_validation.on_refused:
            callback(reason)
    samples = _samples(_scrape())
    assert _value(samples, "deltamem_requests_refused_total", reason="a") == 2
    assert _value(samples, "deltamem_requests_refused_total", reason="b") == 1


def test_every_reason_to_refuse_has_a_series_from_the_start() -> None:
    # Heard only while the policy is off, and then nothing of ours is exported.
    reasons = set(request_validation.REASONS) - {"policy_inactive"}
    assert set(metric("requests_refused").initial) == reasons


def test_a_second_engine_in_the_process_starts_from_zero(stat_logger: DeltaMemStatLogger) -> None:
    telemetry = Telemetry()
    telemetry.count("compactions")
    _record(stat_logger, _step(telemetry), 0)
    callbacks = len(request_validation.on_refused)
    DeltaMemStatLogger(vllm_config=_vllm_config({"deltamem": CONFIG}), engine_indexes=[0])
    assert _value(_samples(_scrape()), "deltamem_compactions_total", engine="0") == 0
    assert len(request_validation.on_refused) == callbacks


@pytest.mark.parametrize("additional_config", [{}, {"other": {"a": 1}}])
def test_without_the_flag_nothing_is_exported(additional_config: dict[str, Any]) -> None:
    idle = DeltaMemStatLogger(vllm_config=_vllm_config(additional_config), engine_indexes=[0])
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"waiting_to_start": 1})
    _record(idle, stats, 0)
    assert not _samples(_scrape())
    assert stats.num_kv_fetch_reqs_by_stage == {"waiting_to_start": 1}


def test_vllm_accepts_the_class_as_one_logger_for_all_engines() -> None:
    """What `load_stat_logger_plugin_factories` and `StatLoggerManager` ask of an entry point."""
    assert issubclass(DeltaMemStatLogger, AggregateStatLoggerBase)
    DeltaMemStatLogger(vllm_config=_vllm_config({}), engine_indexes=[0]).record_admission_rejection("queue")


# ---- several API servers --------------------------------------------------------------------------------


def test_two_api_servers_show_exact_sums(tmp_path: Path) -> None:
    """Each step of an engine is heard by one of two servers at random; the aggregate misses nothing."""
    chance = random.Random(7)
    engines = [Telemetry(), Telemetry()]
    first: list[tuple[int, dict[str, int]]] = []
    second: list[tuple[int, dict[str, int]]] = []
    after_first: list[int] = []
    for share in (first, second):
        for step in range(20):
            index = chance.randrange(2)
            engines[index].count("evicted_tokens", chance.randrange(1000))
            engines[index].count("scoring_us", chance.randrange(1_000_000))
            engines[index].count("skipped", label=chance.choice(["no_free_blocks", "shared_prefix"]))
            engines[index].observe("kept_share", chance.randrange(1, 100), 100)
            engines[index].level("resident_tokens", 1000 * (index + 1) + step)
            share.append((index, engines[index].drain()))
        if share is first:
            after_first = [telemetry.totals()["levels"]["resident_tokens"] for telemetry in engines]

    script = Path(__file__).parents[1] / "support" / "api_servers.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([first, second]),
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    _, late_start, end = json.loads(done.stdout.splitlines()[-1])
    assert len(list(tmp_path.glob("counter_*.db"))) == 2, "two processes must have written"

    shown = _samples(end)
    for index, telemetry in enumerate(engines):
        counters, levels = telemetry.totals()["counters"], telemetry.totals()["levels"]
        engine = str(index)
        assert counters["evicted_tokens"] > 0
        assert _value(shown, "deltamem_evicted_tokens_total", engine=engine) == counters["evicted_tokens"]
        seconds = _value(shown, "deltamem_scoring_seconds_total", engine=engine)
        assert seconds == pytest.approx(counters["scoring_seconds"], rel=1e-9)
        for reason, times in counters["compactions_skipped"].items():
            skipped = _value(shown, "deltamem_compactions_skipped_total", engine=engine, reason=reason)
            assert skipped == times
        kept = telemetry.totals()["histograms"]["kept_share"]
        for bound, count in kept["buckets"].items():
            assert _value(shown, "deltamem_kept_share_bucket", engine=engine, le=bound) == count
        assert _value(shown, "deltamem_kept_share_count", engine=engine) == kept["count"] > 0
        assert _value(shown, "deltamem_resident_tokens", engine=engine) == levels["resident_tokens"]
        # A server that starts late and has heard nothing must not hide what the other one knows.
        early = _value(_samples(late_start), "deltamem_resident_tokens", engine=engine)
        assert early == after_first[index]
        assert _value(_samples(late_start), "deltamem_logical_tokens", engine=engine) == 0
    _assert_clean(end)
