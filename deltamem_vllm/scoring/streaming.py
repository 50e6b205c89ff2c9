# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""StreamingLLM: sinks and a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamem_vllm.scoring.base import Scorer, ScoreView


class StreamingScorer(Scorer):
    """The newest entries. Together with the protected sink tokens this is StreamingLLM.

    The original renumbers positions inside the cache; here positions never change.
    """

    name = "streaming"
    summary = "the newest entries (with the protected sinks: StreamingLLM)"
    source = "StreamingLLM, arXiv 2309.17453"

    def score(self, view: ScoreView) -> Tensor:
        age = torch.arange(view.num_resident, dtype=torch.float32, device=view.keys.device)
        return age.expand(view.num_kv_heads, -1).contiguous()
