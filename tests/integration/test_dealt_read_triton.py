# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""vLLM's GPU attention kernel over dealt pages, through Triton's interpreter: what a CPU can show of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def test_triton_attention_reads_dealt_pages() -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(SUPPORT / "v2"), str(SUPPORT)]),
        "DELTAMEM_TEST_TRITON_ON_CPU": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "triton_dealt_read.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    for kind in ("decode", "chunk"):
        # float32 sums in another order.
        assert results[kind]["error"] <= 1e-4, results
        assert results[kind]["control"] > 1e-2, results
