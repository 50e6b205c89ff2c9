# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`python -m deltamem_vllm.evaluation.gpu_check`: docs/guides/gpu-check.md says what it does."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

NO_GPU = 3
"""Exit code where there is no GPU to check."""


def main() -> int:
    """Returns the exit code: 0 all right, 1 something is wrong, 3 no GPU."""
    parser = argparse.ArgumentParser(prog="python -m deltamem_vllm.evaluation.gpu_check", description=__doc__)
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_89 and sm_90; needs no GPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="with --compile-only: settings with this in them")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"), help="folder of the report")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        print("gpu-check: TRITON_INTERPRET is set, so nothing would be compiled; unset it", file=sys.stderr)
        return 2
    if options.compile_only:
        return compile_only(options.only)
    return check(options.out)


def compile_only(only: str) -> int:
    """Print what every kernel takes of a GPU."""
    from deltamem_vllm.evaluation.gpu_check.compile_table import HEADER, as_markdown, compile_all
    from deltamem_vllm.evaluation.gpu_check.settings_to_compile import all_settings

    chosen = [setting for setting in all_settings() if only in str(setting)]
    if not chosen:
        print(f"gpu-check: no setting has {only!r} in its name", file=sys.stderr)
        return 2
    print(HEADER)
    for row in compile_all(chosen):
        print(as_markdown(row), flush=True)
    return 0


def check(folder: Path) -> int:
    """Check and time every operation on the first GPU, and write the report."""
    import torch

    if not torch.cuda.is_available():
        print(
            "gpu-check: no GPU here that torch can use (torch.cuda.is_available() is false). On a machine with one, "
            "install a CUDA build of torch. Without one, --compile-only shows whether the kernels compile.",
            file=sys.stderr,
        )
        return NO_GPU
    from deltamem_vllm.evaluation.gpu_check.exact import check_all
    from deltamem_vllm.evaluation.gpu_check.report import Report
    from deltamem_vllm.evaluation.gpu_check.speed import time_all
    from deltamem_vllm.evaluation.gpu_check.timing import Clock
    from deltamem_vllm.evaluation.machine import describe_code, describe_machine

    device = torch.device("cuda", 0)
    clock = Clock(device)
    report = Report(
        device=torch.cuda.get_device_name(device),
        machine=describe_machine() | describe_code(("gpu_check/",)),
        copy_gb_per_s=clock.copy_bandwidth() / 1e9,
        agreements=[],
        timed=[],
    )
    for agreement in check_all(device):
        report.agreements.append(agreement)
        print(f"{agreement.deviation:10.3g}  {agreement.operation}: {agreement.case}", flush=True)
    if not report.wrong:  # times of wrong results mean nothing
        for timed in time_all(device, clock):
            report.timed.append(timed)
            print(f"{timed.seconds['deltamem'] * 1e3:8.3f} ms  {timed.operation}: {timed.case}", flush=True)
    print(f"gpu-check: {report.write(folder)}")
    for agreement in report.wrong:
        print(f"gpu-check: WRONG {agreement.operation}: {agreement.case}", file=sys.stderr)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
