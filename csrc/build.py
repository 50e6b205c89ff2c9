#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Compile csrc/cpu into one shared library. Used by setup.py, `make native` and `make sanitize`; needs no packages.

One binary serves every CPU: a file's name says which instructions it may use, and the library chooses at run time
(csrc/cpu/isa.h).

The library is deliberately not linked against an OpenMP runtime. A process must have one of them only, torch's, for
that is the one whose threads a worker binds to cores. Its file has another name in every build of torch, so that a
dependency of our own would load a second one; `deltamem_vllm/ops/native.py` offers torch's at load instead.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "cpu"

# -ffp-contract=off: a product and a sum must not become one rounding on some machines and two on others.
COMMON = [
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
FLAGS_OF_SUFFIX = {
    "_avx512bf16": [*_AVX512, "-mavx512bf16", "-mavx512vbmi"],
    "_avx512": _AVX512,
    "_avx2": _AVX2,
}
# The two are wrong about GCC 12's own headers: many of their functions start from a vector that is left undefined.
STRICT = ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compiler() -> list[str]:
    """The C++ compiler as a command: CXX, or the first that is there.

    Raises
    ------
    FileNotFoundError: there is none.
    """
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("g++", "c++"):
        if shutil.which(name):
            return [name]
    raise FileNotFoundError("no C++ compiler found: install g++ (Debian: apt-get install g++) or name one with CXX")


def machine_flags(source: Path, machine: str) -> list[str] | None:
    """The instructions that a source may use; None if it is for another kind of machine."""
    for suffix, flags in FLAGS_OF_SUFFIX.items():
        if source.stem.endswith(suffix):
            return flags if machine in ("x86_64", "AMD64") else None
    return []


def build(output: Path, work: Path, *, strict: bool = False, sanitize: bool = False) -> Path:
    """Compile what changed and link.

    Parameters
    ----------
    output: the shared library to write.
    work: folder for object files, which are kept for the next time.
    strict: warnings are errors; not for users, whose compilers we do not know.
    sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Returns
    -------
    ``output``.

    Raises
    ------
    FileNotFoundError: there is no compiler.
    subprocess.CalledProcessError: compiling failed.
    """
    command = [*compiler(), *COMMON, *(STRICT if strict else []), *(SANITIZE if sanitize else [])]
    work.mkdir(parents=True, exist_ok=True)
    jobs: dict[Path, list[str]] = {}
    for source in sorted(SOURCES.glob("*.cpp")):
        flags = machine_flags(source, platform.machine())
        if flags is not None:
            own = [*command, *flags, "-c", str(source)]
            key = hashlib.sha256(b"\0".join([" ".join(own).encode(), *_text_of(source)])).hexdigest()[:16]
            jobs[work / f"{source.stem}.{key}.o"] = own
    missing = {object_: own for object_, own in jobs.items() if not object_.exists()}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(_compile, missing.items()))
    for old in set(work.glob("*.o")) - set(jobs):
        old.unlink()
    output.parent.mkdir(parents=True, exist_ok=True)
    # A process may have the old library mapped: it is replaced, never written into.
    fresh = output.with_name(f"{output.name}.{os.getpid()}")
    link = [*compiler(), "-shared", "-o", str(fresh), *map(str, jobs)]
    _call([*link, *(["-fsanitize=address,undefined"] if sanitize else [])])
    os.replace(fresh, output)
    return output


def _text_of(source: Path) -> list[bytes]:
    """What the file and all files of this folder that it includes, directly or not, say."""
    texts: dict[str, bytes] = {}
    wanted = [source.name]
    while wanted:
        name = wanted.pop()
        if name not in texts and (SOURCES / name).is_file():
            texts[name] = (SOURCES / name).read_bytes()
            wanted += re.findall(r'^#include "([^"]+)"', texts[name].decode(), re.MULTILINE)
    return [texts[name] for name in sorted(texts)]


def _compile(job: tuple[Path, list[str]]) -> None:
    object_, command = job
    fresh = object_.with_suffix(f".{os.getpid()}.tmp")
    _call([*command, "-o", str(fresh)])
    os.replace(fresh, object_)


def _call(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the C++ compiler {command[0]!r} is not there: install g++ or set CXX") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    root = SOURCES.parent.parent
    parser.add_argument("--output", type=Path, default=root / "deltamem_vllm" / "_native.so")
    parser.add_argument("--work", type=Path, default=root / "build" / "native")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    args = parser.parse_args()
    try:
        built = build(args.output, args.work, strict=args.strict, sanitize=args.sanitize)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(f"csrc/build.py: {error}")
    print(f"built {built}")


if __name__ == "__main__":
    main()
