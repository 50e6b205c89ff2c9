#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Run the native kernels' tests with a library built with sanitizers: `make sanitize`.

AddressSanitizer has to be in a process from its start, so Python is started with it. It then watches torch's memory
too: a kernel that reads or writes one byte past a tensor ends the run.

    scripts/sanitize.py build/sanitized/_native.so [tests and options for pytest]
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_cold_ops.py",
    "test_gather_native.py",
    "test_dealt_pages.py",
    "test_paged_attention.py",
    "test_page_utility.py",
    "test_deal_native.py",
)
# Of a property: sanitizers look for what any shape does, the ordinary tests for what only a rare one does.
MOST_EXAMPLES = 10


def main() -> None:
    library, *arguments = sys.argv[1:]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    runtimes = [_runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(runtimes),
        "DELTAMEM_NATIVE_LIBRARY": str(Path(library).resolve()),
        # What Python and torch keep until their end is no leak of ours.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
        "DELTAMEM_MOST_EXAMPLES": os.environ.get("DELTAMEM_MOST_EXAMPLES", str(MOST_EXAMPLES)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    tests = [str(path) for name in TESTS if (path := ROOT / "tests" / "unit" / name).exists()]
    # Only Python's own output is captured: what a sanitizer says goes past Python, and must be seen.
    options = ["-q", "-x", "-p", "no:cacheprovider", "--capture=sys"]
    command = [sys.executable, "-m", "pytest", *options, *(arguments or tests)]
    sys.exit(subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode)


def _runtime(compiler: list[str], name: str) -> str:
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        sys.exit(f"sanitize: {compiler[0]} has no {name}; Debian: apt-get install g++ (libasan, libubsan)")
    return str(path.resolve())


if __name__ == "__main__":
    main()
