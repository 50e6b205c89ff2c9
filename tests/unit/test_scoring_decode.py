# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The benchmark of decode steps adds up the time of the calls it was given, and nothing else."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("scoring_decode")


def test_parts_are_shares_of_the_steps(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    spent = benchmark.Spent(steps=[1.0, 4.0])
    rate = spent.timed("rating", lambda scale, *, of: scale * of)
    assert rate(2, of=3) == 6
    with pytest.raises(ZeroDivisionError):
        spent.timed("rating", lambda: 1 / 0)()
    assert spent.parts == {"remembering": 0.0, "rating": 0.75, "compacting": 0.0}
    assert spent.share("rating") == pytest.approx(0.15)


def test_what_it_times_is_there(benchmark: ModuleType) -> None:
    """The names that it puts clocks around, as it finds them."""
    from deltamem_vllm.dealing.rater import Rater
    from deltamem_vllm.integration import backends
    from deltamem_vllm.integration.compactor import Compactor
    from deltamem_vllm.scoring import window

    assert backends.record is window.record
    assert callable(Rater.rate) and callable(Compactor.run) and callable(window.ObservationWindow.begin_step)
