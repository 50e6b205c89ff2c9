# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What stands for a base image: a Python and Debian's libraries, in a folder. See scripts/check_cpu_image.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

SYSTEM_PREFIXES = ("/usr", "/usr/local")
"""Where a Python is everyone's. Any other one, such as in a home, is copied: the image's user could not read it."""


class StepFailed(RuntimeError):
    """A step of the image that did not work; the message says which and why."""


def base_python(image: str, folder: Path) -> Path:
    """The folder of a program `python` that stands for the base image `image`, `python:3.11...`.

    It is this machine's own, by a link below `folder` where it has another name, or a copy of it there without what was
    installed into it.
    """
    match = re.match(r"python:(\d+\.\d+)", image)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if match is None or match[1] != version:
        raise StepFailed(f"base image {image} is no python:{version}, which this runs with; run it with the same")
    prefix = Path(sys.base_prefix)
    own = folder / "python"
    if str(prefix) in SYSTEM_PREFIXES:
        if (prefix / "bin" / "python").exists():
            return prefix / "bin"
        # Debian's own is called python3 only.
        (own / "bin").mkdir(parents=True, exist_ok=True)
        (own / "bin" / "python").unlink(missing_ok=True)
        (own / "bin" / "python").symlink_to(prefix / "bin" / f"python{version}")
        return own / "bin"
    if not own.exists():
        library = f"lib/python{version}"
        installed = shutil.ignore_patterns("site-packages", "test", "__pycache__")
        shutil.copytree(prefix / library, own / library, ignore=installed, symlinks=True)
        (own / library / "site-packages").mkdir()
        shutil.copytree(prefix / "include", own / "include", symlinks=True)
        for shared in (prefix / "lib").glob("libpython*"):
            shutil.copy2(shared, own / "lib", follow_symlinks=False)
        (own / "bin").mkdir()
        shutil.copy2(prefix / "bin" / f"python{version}", own / "bin" / "python")
    return own / "bin"


def hard_copy(source: Path, target: Path) -> None:
    """A copy whose files are hard links: nothing of a finished stage is written again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "--archive", "--link", "--no-target-directory", str(source), str(target)], check=True)


def unpack_debian(package: str, folder: Path) -> None:
    """Unpack a Debian package below `folder` without installing it."""
    folder.mkdir(parents=True, exist_ok=True)
    download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]
    if subprocess.run(download, cwd=folder, capture_output=True, check=False).returncode != 0:
        # Fresh machines have no package lists yet.
        subprocess.run(["apt-get", "-qq", "update"], check=False)
        if (again := subprocess.run(download, cwd=folder, capture_output=True, text=True, check=False)).returncode:
            raise StepFailed(f"apt has no package {package}: {again.stderr.strip()}")
    for archive in folder.glob(f"{package}_*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)


def give(folder: Path, owner: int) -> None:
    """Make a number the owner of a folder, if the caller may."""
    if os.geteuid() == 0:
        os.chown(folder, owner, owner)
