# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The GPU kernels compile for two generations of GPUs, and take no more of them than they should. Needs no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import triton

from deltamem_vllm.evaluation.gpu_check.compile_table import HEADER, Row, as_markdown, compile_all
from deltamem_vllm.evaluation.gpu_check.compiled import SHARED_LIMIT, compile_launch
from deltamem_vllm.evaluation.gpu_check.settings_to_compile import KERNELS, Setting, all_settings

# Bytes that a thread may put aside and fetch again, both added. A few registers too many, in a loop that waits for
# memory, are not worth a smaller tile; a few hundred are.
SPILL_BOUND = 256
# Heads of 256 with cold pages: smaller tiles do not help (800 to 1300 bytes), presumably because every warp holds the
# whole query, scaled in two parts and unscaled.
WIDE_COLD_SPILL_BOUND = 1536
# Scores of heads of 256, for the same reason: with 4 or 16 warps it is more than with 8 (628 and 744 bytes).
WIDE_SCORES_SPILL_BOUND = 768
GATHER = Setting("gather_pages", "", torch.bfloat16, 128, 1, 32, 0)


def check(rows: list[Row]) -> None:
    print("\n".join([HEADER, *map(as_markdown, rows)]))
    for row in rows:
        has = row.resources
        bound = SPILL_BOUND
        if row.setting.dim == 256 and row.setting.bits > 0 and row.kernel == "attend_pages":
            bound = WIDE_COLD_SPILL_BOUND
        if row.setting.dim == 256 and row.kernel == "window_scores":
            bound = WIDE_SCORES_SPILL_BOUND
        assert has.spill_stores + has.spill_loads <= bound, as_markdown(row)
        assert has.shared <= SHARED_LIMIT[has.arch], as_markdown(row)
        assert has.registers * has.threads <= 65536, as_markdown(row)
        multiplies = row.kernel in ("attend_pages", "window_outputs", "window_scores")
        assert has.tensor_cores == multiplies, as_markdown(row)


def test_moving_tokens_compiles() -> None:
    check(list(compile_all([GATHER])))


@pytest.mark.slow
@pytest.mark.parametrize("setting", all_settings(), ids=str)
def test_everything_compiles(setting: Setting) -> None:
    check(list(compile_all([setting])))


def test_every_kernel_is_among_the_settings() -> None:
    seen = {launch.kernel.__name__ for setting in all_settings() for launch in setting.launches()}
    assert seen == {kernel.__name__ for kernel in KERNELS}


def test_a_kernel_that_takes_too_much_is_seen() -> None:
    launch = GATHER.launches()[0]
    launch.constants["TOKENS"] = 512  # 512 elements a thread, and as many addresses
    assert compile_launch(launch, 89).spill_stores > SPILL_BOUND


def test_broken_constants_do_not_compile() -> None:
    launch = GATHER.launches()[0]
    launch.constants["TOKENS"] = 3  # no power of two
    with pytest.raises(triton.CompilationError):
        compile_launch(launch, 90)


def test_without_a_gpu_the_check_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deltamem_vllm.evaluation.gpu_check"],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "no GPU" in done.stderr and "--compile-only" in done.stderr
