# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""configs/serve/cpu.yaml served for real, and the CPU image's steps carried out from nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.evaluation.live_server import serve
from tests.support.deploy import ROOT, read_yaml

CPU = ROOT / "configs" / "serve" / "cpu.yaml"


@pytest.mark.slow
def test_the_cpu_config_serves_what_it_says(smollm2_path: str, tmp_path: Path) -> None:
    given = read_yaml(CPU)
    # Eager: starts sooner. `serve` sets VLLM_CPU_KVCACHE_SPACE, which replaces the pool's size, to the same 1 GiB; if
    # it is unset the file's own counts, as in the image below.
    flags = ["--config", str(CPU), "--enforce-eager"]
    with serve(smollm2_path, tmp_path / "server.log", deltamem=None, flags=flags) as server:
        (engine,) = json.loads(server.get("/deltamem/stats"))["engines"]
        config = json.loads(server.get("/deltamem/config"))
        (model,) = json.loads(server.get("/v1/models"))["data"]
        body = {"model": given["served-model-name"], "prompt": "The capital of France is", "max_tokens": 8}
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body | {"temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = json.load(answer)["choices"][0]["text"]
    assert "Paris" in text
    assert (model["id"], model["max_model_len"]) == (given["served-model-name"], given["max-model-len"])
    assert DeltaMemConfig.from_dict(given["deltamem-config"]).keep_ratio == 0.25
    assert '"keep_ratio": 0.25' in json.dumps(config) and '"mode": "pressure"' in json.dumps(config)
    # Blocks of 32 tokens in the bytes that the file gives them: what its header works out.
    pool = engine["pool"]
    assert pool["block_tokens"] == 32
    header = " ".join(line.removeprefix("#").strip() for line in CPU.read_text().splitlines())
    assert f"in blocks of 32 {given['kv-cache-memory-bytes'] // pool['block_bytes'] * 32:,}" in header


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_image_is_made_of_steps_that_work(tmp_path: Path) -> None:
    # Installs vLLM anew: four minutes on an idle machine whose pip cache is warm, 5 GB of disk.
    free = shutil.disk_usage(tmp_path).free
    if free < 8 << 30:
        pytest.skip(f"{free >> 30} GiB free in {tmp_path}; the image takes 5 and some to build")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_cpu_image.py", "--port", "8148"],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "completion of 'The capital of France is'" in done.stdout
    assert "/deltamem/stats: pool" in done.stdout
    print(f"{time.monotonic() - began:.0f} s")
