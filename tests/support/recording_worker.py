# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A deltamem worker that also writes down which entries it kept.

Given to vLLM as ``worker_cls``; runs in the engine's process or, with tensor parallelism, in one process per
rank.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from deltamem_vllm.integration.worker import DeltaMemCPUWorker

RECORD_DIR = "DELTAMEM_TEST_RECORD_DIR"


class RecordingWorker(DeltaMemCPUWorker):
    """Saves the n-th compaction of rank r as ``rank<r>-<n>.pt``."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        self._recorded = 0
        self.deltamem.compactor.on_compaction = self._record

    def _record(self, plan: Any, survivors: list[torch.Tensor]) -> None:
        path = Path(os.environ[RECORD_DIR], f"rank{self.rank}-{self._recorded:05d}.pt")
        data = {
            "request": plan.request_id,
            "logical_len": plan.logical_len,
            "survivors": torch.stack([s.cpu() for s in survivors]),
        }
        torch.save(data, path)
        self._recorded += 1
