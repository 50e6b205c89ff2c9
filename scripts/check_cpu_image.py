# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Run the steps of docker/Dockerfile.cpu without a container engine, and the server that they make.

python scripts/check_cpu_image.py [--keep FOLDER] [--port N] [--build-arg NAME=VALUE] [--eager]

Each stage is built in an empty folder that stands for the image's root: COPY, ENV, ARG, WORKDIR and RUN are carried out
with every path of the image moved there, and only what `COPY --from` names goes from one stage to the next. Then the
image's entry point is started as its user (if the caller is root) with the image's environment and nothing else, and
asked: its own HEALTHCHECK, one completion, /deltamem/stats.

What is not the image's: the machine's Python stands for the base image (the same minor version is required), system
libraries are unpacked from Debian's packages instead of installed, and g++ must be on the machine. pip uses this
machine's configuration and cache. Ends with status 1 at the first step that fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from image_base import StepFailed
from image_server import ask
from image_steps import Image

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile.cpu"


def main(argv: list[str] | None = None) -> int:
    """Run the check; the exit status."""
    parser = argparse.ArgumentParser(description="Run the steps of docker/Dockerfile.cpu without a container engine.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="build there and leave it; else in a temporary one")
    parser.add_argument("--port", type=int, default=8149, help="where the server listens, on 127.0.0.1")
    parser.add_argument(
        "--build-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as for docker build",
    )
    parser.add_argument(
        "--eager",
        action="store_true",
        help="do not compile the model's kernels, which the image does: sooner, and less shown",
    )
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        given = dict(pair.split("=", 1) for pair in args.build_arg)
    except ValueError:
        parser.error(f"--build-arg takes NAME=VALUE, got {args.build_arg}")
    try:
        if args.keep is not None:
            args.keep.mkdir(parents=True)
            check(args.keep.resolve(), args.port, given, eager=args.eager)
        else:
            with tempfile.TemporaryDirectory(prefix="deltamem-image-") as folder:
                check(Path(folder), args.port, given, eager=args.eager)
    except (StepFailed, FileExistsError) as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    print(f"\nThe image's steps and its server work; {time.monotonic() - began:.0f} s in all.")
    return 0


def check(folder: Path, port: int, build_args: dict[str, str], *, eager: bool = False) -> None:
    """Build below `folder` and ask the server; raises `StepFailed`."""
    folder.chmod(0o755)  # the image's user has to get in
    image = Image(ROOT, folder, build_args)
    image.build(DOCKERFILE.read_text(encoding="utf-8"))
    ask(image, port, ["--enforce-eager"] if eager else [])


if __name__ == "__main__":
    sys.exit(main())
