# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A deltamem worker that also writes down which entries it kept, and where.

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
from recorded_pages import RecordedPages

from deltamem_vllm.integration.worker import DeltaMemCPUWorker

# Tensor-parallel ranks are processes of their own, and each loads its scorers after it has imported this module.
uneven_scorer.register()

RECORD_DIR = "DELTAMEM_TEST_RECORD_DIR"


class RecordingWorker(DeltaMemCPUWorker):
    """Saves the n-th compaction of rank r as ``rank<r>-<n>.pt``, and its dealt pages as ``pages<r>-<n>.pt``."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        super().initialize_from_config(kv_cache_config)
        self._recorded = 0
        self._bits = self.vllm_config.additional_config["deltamem"].get("cold_bits", 0)
        self.deltamem.compactor.on_compaction = self._record
        self.deltamem.compactor.on_coded = self._record_cold

    def _record(self, plan: Any, survivors: Sequence[Sequence[torch.Tensor]]) -> None:
        data = {
            "request": plan.request_id,
            "serial": plan.serial,
            # Cloned: a view would be saved with all of the tensor behind it.
            "survivors": [[head.cpu().clone() for head in heads] for heads in survivors],
        }
        torch.save(data, self._path("rank"))
        self._recorded += 1
        if plan.dealing != "equal":
            self._pages = RecordedPages.of_worker(self.deltamem.dealt.tables, plan, self._bits)
            self._pages.save(self._path("pages", back=1))

    def _record_cold(self, plan: Any, choice: Any) -> None:
        """Called right after `_record`."""
        self._pages.with_cold(self.deltamem.dealt.tables, plan, choice).save(self._path("pages", back=1))

    def _path(self, what: str, back: int = 0) -> Path:
        return Path(os.environ[RECORD_DIR], f"{what}{self.rank}-{self._recorded - back:05d}.pt")
