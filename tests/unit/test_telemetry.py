# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Counting, and the names under which the numbers travel and are shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamem_vllm import telemetry
from deltamem_vllm.telemetry import METRICS, Telemetry, decode, encode

COUNTERS = [row for row in METRICS if row.kind == "counter" and row.side == "engine"]
GAUGES = [row for row in METRICS if row.kind == "gauge"]
HISTOGRAMS = [row for row in METRICS if row.kind == "histogram"]
LABEL_VALUES = st.text(min_size=1, max_size=12)


def _event(row: telemetry.Metric) -> st.SearchStrategy[tuple[str, int, str | None]]:
    label = st.none() if row.label is None else LABEL_VALUES
    return st.tuples(st.just(row.key), st.integers(0, 2**40), label)


events = st.lists(st.one_of(st.none(), *(_event(row) for row in (*COUNTERS, *GAUGES))), max_size=60)


@given(events)
def test_drained_deltas_add_up_to_the_totals(steps: list[tuple[str, int, str | None] | None]) -> None:
    """Whatever the order of counting and draining (None drains), nothing is lost and nothing sent twice."""
    counted = Telemetry()
    added: Counter[str] = Counter()
    levels: dict[str, int] = {}
    expected: Counter[str] = Counter()
    for step in [*steps, None]:
        if step is None:
            for name, amount in counted.drain().items():
                decoded = decode(name)
                assert decoded is not None
                if decoded[0].kind == "counter":
                    added[name] += amount
                else:
                    levels[name] = amount
            continue
        key, amount, label = step
        if telemetry.metric(key).kind == "counter":
            counted.count(key, amount, label)
            expected[encode(key, label)] += amount
        else:
            counted.level(key, amount, label)

    assert +added == +expected
    assert _public(dict(added)) == _non_zero(counted.totals()["counters"])
    assert _public(levels) == _non_zero(counted.totals()["levels"])


def _public(carried: dict[str, int]) -> dict[str, object]:
    """The carrier's numbers in the shape of `totals()`, without zeros."""
    shown: dict[str, object] = {}
    for name, amount in carried.items():
        decoded = decode(name)
        assert decoded is not None
        row, label = decoded
        value = row.public_value(amount)
        if not value:
            continue
        if label is None:
            shown[row.name] = value
        else:
            by_label = shown.setdefault(row.name, {})
            assert isinstance(by_label, dict)
            by_label[label] = value
    return shown


def _non_zero(totals: dict[str, object]) -> dict[str, object]:
    flat = {
        name: {label: one for label, one in value.items() if one} if isinstance(value, dict) else value
        for name, value in totals.items()
    }
    return {name: value for name, value in flat.items() if value}


def test_drain_sends_only_counters_that_grew_and_every_level() -> None:
    counted = Telemetry()
    counted.count("compactions", 2)
    counted.level("resident_tokens", 7)
    first, second = counted.drain(), counted.drain()
    assert first["deltamem:compactions"] == 2
    assert "deltamem:evicted_tokens" not in first
    assert "deltamem:compactions" not in second
    levels = {name for name in second if first[name] == second[name]}
    assert levels == set(second) == {encode(row.key, label) for row in GAUGES for label in row.initial or (None,)}
    assert second["deltamem:resident_tokens"] == 7


@given(st.sampled_from(METRICS), LABEL_VALUES)
def test_carrier_names_are_read_back(row: telemetry.Metric, value: str) -> None:
    label = value if row.label or row.kind == "histogram" else None
    assert decode(encode(row.key, label)) == (row, label)


def test_other_names_in_the_carrier_are_not_ours() -> None:
    assert decode("waiting_to_start") is None


@pytest.mark.parametrize("call", [lambda: Telemetry().count("compressions"), lambda: decode("deltamem:compressions")])
def test_unknown_key_names_the_valid_ones(call: object) -> None:
    assert callable(call)
    with pytest.raises(KeyError, match=r"'compressions'.*compactions.*reserve_blocks"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.count("resident_tokens"), "'resident_tokens' is a gauge, not a counter"),
        (lambda t: t.level("compactions", 1), "'compactions' is a counter, not a gauge"),
        (lambda t: t.count("skipped"), "needs a value for its label 'reason', got None"),
        (lambda t: t.count("compactions", label="x"), "'compactions' has no label, got 'x'"),
        (lambda t: t.count("compactions", -1), "cannot shrink, got -1"),
    ],
)
def test_misuse_is_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Telemetry())


def test_totals_start_at_zero_in_public_units_and_are_json() -> None:
    counted = Telemetry()
    assert set(_non_zero(counted.totals()["counters"])) == set()
    counted.count("compaction_us", 1_500_000)
    counted.count("skipped", 3, label="no_free_blocks")
    totals = counted.totals()
    assert totals["counters"]["compaction_seconds"] == pytest.approx(1.5)
    assert totals["counters"]["compactions_skipped"] == {"no_free_blocks": 3, "shared_prefix": 0}
    assert totals["levels"]["tier_bytes"] == {"cold": 0, "hot": 0}
    assert totals["histograms"]["kept_share"]["count"] == 0
    assert "requests_refused" not in totals["counters"], "counted in the API servers, unknown to an engine"
    assert json.loads(json.dumps(totals)) == totals


def test_public_names_follow_prometheus_conventions() -> None:
    names = [row.public_name for row in METRICS]
    assert len(set(names)) == len(names) == len({row.key for row in METRICS})
    for row in METRICS:
        assert re.fullmatch(r"deltamem(_[a-z]+)+", row.public_name)
        assert row.public_name.endswith("_total") == (row.kind == "counter")
        assert not row.key.endswith("_us") or "_seconds" in row.public_name
        assert ":" not in row.key


shares = st.integers(1, 5000).flatmap(lambda whole: st.tuples(st.integers(0, whole), st.just(whole)))


@given(st.sampled_from(HISTOGRAMS), st.lists(shares, max_size=40), st.integers(0, 40))
def test_every_share_is_in_its_own_bucket_on_both_sides(
    row: telemetry.Metric, seen: list[tuple[int, int]], drained_after: int
) -> None:
    """The engine's buckets are those of the exact shares, and what travels adds up to the same ones."""
    counted = Telemetry()
    carried: Counter[str] = Counter()
    for number, (part, whole) in enumerate(seen):
        if number == drained_after:
            carried.update({name: n for name, n in counted.drain().items() if name.startswith(f"deltamem:{row.key}:")})
        counted.observe(row.key, part, whole)
    carried.update({name: n for name, n in counted.drain().items() if name.startswith(f"deltamem:{row.key}:")})

    exact = [Fraction(part, whole) for part, whole in seen]
    expected = {str(bound): sum(one <= Fraction(str(bound)) for one in exact) for bound in row.buckets}
    told = counted.totals()["histograms"][row.name]
    assert told["buckets"] == {**expected, "+Inf": len(seen)}
    assert told["count"] == len(seen) == sum(carried.values())
    assert -1e-9 <= told["sum"] - float(sum(exact)) <= len(seen) / 1000 + 1e-9
    heard: Counter[str] = Counter()
    for name, number in carried.items():
        decoded = decode(name)
        assert decoded is not None and decoded[0] is row and decoded[1] is not None
        for bound in row.buckets:
            heard[str(bound)] += number if telemetry.share(int(decoded[1])) <= bound else 0
    assert +heard == +Counter(expected)


def test_shares_outside_of_zero_to_one_are_refused() -> None:
    for part, whole in ((-1, 4), (5, 4)):
        with pytest.raises(ValueError, match=f"shares from 0 to 1, got {part} of {whole}"):
            Telemetry().observe("kept_share", part, whole)
    with pytest.raises(ValueError, match="'compactions' is a counter, not a histogram"):
        Telemetry().observe("compactions", 1, 2)


def test_bounds_of_buckets_are_whole_permille_and_ascend() -> None:
    """Otherwise rounding up would move a share into another bucket."""
    for row in HISTOGRAMS:
        assert list(row.buckets) == sorted(set(row.buckets))
        assert all(Fraction(str(bound)) * 1000 % 1 == 0 for bound in row.buckets)


def _reference(*args: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "scripts" / "metrics_reference.py"
    return subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, check=False)


def test_reference_page_is_up_to_date() -> None:
    checked = _reference("--check")
    assert checked.returncode == 0, checked.stdout


def test_a_stale_reference_page_fails_the_check(tmp_path: Path) -> None:
    page = tmp_path / "metrics.md"
    assert _reference("--check", "--page", str(page)).returncode == 1, "there is no page"
    assert _reference("--page", str(page)).returncode == 0
    assert _reference("--check", "--page", str(page)).returncode == 0
    page.write_text(page.read_text(encoding="utf-8").replace("counter", "gauge", 1), encoding="utf-8")
    stale = _reference("--check", "--page", str(page))
    assert stale.returncode == 1
    assert "run: python scripts/metrics_reference.py" in stale.stdout
