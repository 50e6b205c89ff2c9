# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Times on a GPU, with CUDA events: alternatives take turns, and the median of their rounds counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

ROUNDS = 15
_WARM_UP = 3
# Much more than any cache: between two runs the memory that they read is gone from it.
_FLUSH_BYTES = 256 * 2**20


class Clock:
    """Measures calls on one GPU, each from cold caches."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each call, taken in turns: A B A B.

        Parameters
        ----------
        calls : mapping
            What to call, by name. Every one may be repeated without changing what it does.
        """
        for call in calls.values():
            for _ in range(_WARM_UP):
                call()
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                self._flush.zero_()
                start.record()
                call()
                end.record()
                end.synchronize()
                taken[name].append(start.elapsed_time(end) / 1000)
        return {name: median(times) for name, times in taken.items()}

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a plain copy of 256 MiB: what memory-bound kernels are held against."""
        source = torch.empty_like(self._flush)
        target = torch.empty_like(self._flush)
        took = self.seconds({"copy": lambda: target.copy_(source)})["copy"]
        return 2 * _FLUSH_BYTES / took
