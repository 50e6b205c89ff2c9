# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""An engine without a process of its own can be asked for its requests and their layers, too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_models import build_tiny_model

POLICY = {"mode": "always", "keep_ratio": 0.5, "min_tokens": 32, "recent_tokens": 8, "window": 4, "cold_bits": 4}


def test_rows_and_layers_of_one_step_agree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    llm = LLM(
        model=str(build_tiny_model("llama", tmp_path)),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        gpu_memory_utilization=0.2,  # the default asks for nearly all memory of the machine
        num_gpu_blocks_override=64,
        additional_config={"deltamem": POLICY},
    )
    engine = llm.llm_engine
    engine.add_request(
        "r",
        {"prompt_token_ids": list(range(5, 405))},
        SamplingParams(max_tokens=60, ignore_eos=True, detokenize=False),
    )
    asked, seen = engine.engine_core.engine_core, set()
    token_bytes = asked.deltamem_stats()["pool"]["block_bytes"] / asked.deltamem_stats()["pool"]["block_tokens"]
    while engine.has_unfinished_requests():
        engine.step()
        for row in asked.deltamem_requests(5)["requests"]:
            view = asked.deltamem_layers(0, row["id"])
            pairs = view["layers"] * view["kv_heads"]
            assert view["logical_tokens"] == row["logical_tokens"]
            assert sum(map(sum, view["hot_tokens"])) / pairs * token_bytes == pytest.approx(row["hot_bytes"], abs=1)
            assert sum(map(sum, view["cold_tokens"])) / pairs == pytest.approx(row["cold_tokens"])
            if not row["compactions"]:
                assert view["hot_tokens"] == [[row["logical_tokens"]] * view["kv_heads"]] * view["layers"]
            seen.add(row["compactions"])
    assert {0, 1} <= seen, "the request was meant to be seen before and after its compaction"
    assert "has ended" in asked.deltamem_layers(0, "r")["missing"]
