# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Learn from the corpus text by text, then measure on the texts that were held out; after each, write down how far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.corpus import TokenSample
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import Geometry
from deltamem_vllm.calibration.metrics import held_out_metrics
from deltamem_vllm.calibration.predictor import PredictorFit, learn
from deltamem_vllm.calibration.profile import rank_profile
from deltamem_vllm.calibration.targets import Observed
from deltamem_vllm.calibration.unfinished import Progress

# Below this many seconds, time left is told in seconds.
_SECONDS_UP_TO = 90


@dataclass(frozen=True)
class Learned:
    """What came out.

    Attributes
    ----------
    weights : Tensor
        [layers, kv heads, features] float32.
    profiles : Tensor
        [texts, layers, kv heads, quantiles] float32.
    """

    weights: Tensor
    profiles: Tensor


class Course:
    """The way through a corpus; one that was interrupted goes on where it was.

    Parameters
    ----------
    observe : Callable
        Lets the model read and use a sample.
    geometry : Geometry
        Of the model, which what is observed has to have.
    target : str
        Of what was observed, what to learn.
    progress : Progress
        What was learned before; updated after each text.
    keep : Callable
        Writes the progress down.
    report : Callable
        Receives a line after each text.
    """

    def __init__(
        self,
        observe: Callable[[TokenSample], Observed],
        geometry: Geometry,
        target: str,
        progress: Progress,
        keep: Callable[[Progress], None],
        report: Callable[[str], None],
    ) -> None:
        self._observe, self._geometry, self._target = observe, geometry, target
        self._progress, self._keep, self._report = progress, keep, report
        self._fit = PredictorFit()
        self._fit.restore(progress.sums)
        self._clocks = time.monotonic() - progress.seconds, time.process_time() - progress.cpu_seconds
        self._spent: list[float] = []

    def go(self, samples: Sequence[TokenSample], held_out: Sequence[TokenSample]) -> Learned:
        """Learn from all samples and measure on those held out, from where the progress is."""
        done, total = self._progress, len(samples) + len(held_out)
        if done.learned:
            self._report(f"going on after {len(done.learned) + len(done.held_out)} of {total} texts")
        for sample in samples[len(done.learned) :]:
            began = time.monotonic()
            seen = self._seen(sample)
            entries = seen.entries(self._target)
            learn(self._fit, entries)
            done.sums = self._fit.sums()
            done.profiles.append(rank_profile(entries.worth))
            done.learned.append(_told(sample, seen))
            self._after(began, sample, seen, total)
        learned = Learned(self._fit.solve(), torch.stack(done.profiles))
        for sample in held_out[len(done.held_out) :]:
            began = time.monotonic()
            seen = self._seen(sample)
            metrics = held_out_metrics(learned.weights, learned.profiles.mean(0), seen.entries(self._target))
            done.held_out.append({**_told(sample, seen), "metrics": metrics})
            self._after(began, sample, seen, total)
        return learned

    def _seen(self, sample: TokenSample) -> Observed:
        seen = self._observe(sample)
        layers, heads = seen.peaks[self._target].shape[:2]
        if (layers, heads) != (self._geometry.layers, self._geometry.kv_heads):
            raise CalibrationError(
                f"attention was seen in {layers} layers with {heads} kv heads; config.json states "
                f"{self._geometry.layers} and {self._geometry.kv_heads}"
            )
        return seen

    def _after(self, began: float, sample: TokenSample, seen: Observed, total: int) -> None:
        done = self._progress
        done.seconds, done.cpu_seconds = time.monotonic() - self._clocks[0], time.process_time() - self._clocks[1]
        self._keep(done)
        self._spent.append(time.monotonic() - began)
        count = len(done.learned) + len(done.held_out)
        left = (total - count) * sum(self._spent) / len(self._spent)
        self._report(
            f"text {count} of {total} ({sample.kind}{', held out' if done.held_out else ''}): {self._spent[-1]:.1f} s"
            f"{_share(seen.repeated, 'repeated')}{_share(seen.answered, 'answered')}; {_time(left)} left"
        )


def _told(sample: TokenSample, seen: Observed) -> dict[str, Any]:
    """What the card says of a text."""
    shares = {"repeated": seen.repeated, "answered": seen.answered}
    return {
        "kind": sample.kind,
        "seed": sample.seed,
        "tokens": len(sample.tokens),
        "questions": len(sample.questions),
        "sha256": sample.sha256,
        **{name: round(share, 4) for name, share in shares.items() if share is not None},
    }


def _share(share: float | None, what: str) -> str:
    return "" if share is None else f", {share:.0%} {what}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds <= _SECONDS_UP_TO else f"{seconds / 60:.0f} min"
