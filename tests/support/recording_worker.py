# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A deltamem worker that also writes down which entries it kept.

Given to vLLM as ``worker_cls``; runs in the engine's process or, with tensor parallelism, in one process per
rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import uneven_scorer

from deltamem_vllm.integration.worker import DeltaMemCPUWorker

# Tensor-parallel ranks are processes of their own, and each loads its scorers after it has imported this module.
uneven_scorer.register()

RECORD_DIR = "DELTAMEM_TEST_RECORD_DIR"


class RecordingWorker(DeltaMemCPUWorker):
    """Saves the n-th compaction of rank r as ``rank<r>-<n>.pt``."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        self._recorded = 0
        self.deltamem.compactor.on_compaction = self._record

    def _record(self, plan: Any, survivors: Sequence[Sequence[torch.Tensor]]) -> None:
        path = Path(os.environ[RECORD_DIR], f"rank{self.rank}-{self._recorded:05d}.pt")
        data = {
            "request": plan.request_id,
            "serial": plan.serial,
            # Cloned: a view would be saved with all of the tensor behind it.
            "survivors": [[head.cpu().clone() for head in heads] for heads in survivors],
        }
        torch.save(data, path)
        self._recorded += 1
