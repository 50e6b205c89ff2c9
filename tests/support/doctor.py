# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Things that are really broken, for the doctor to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterable
from pathlib import Path

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding, Level


def found(check: Callable[[Asked], Iterable[Finding]], asked: Asked) -> list[Finding]:
    """All findings of a check; its children are ended."""
    try:
        return list(check(asked))
    finally:
        asked.close()


def only(findings: Iterable[Finding], level: Level) -> Finding:
    """The one finding of a level."""
    (one,) = [finding for finding in findings if finding.level == level]
    return one


def found_elsewhere(module: str, check: str, *path: Path, python: str = sys.executable) -> list[Finding]:
    """A check's findings in an interpreter of its own with these folders on its path.

    For what depends on what can be imported: this process has imported too much to be asked.
    """
    code = (
        "import dataclasses, json\n"
        "from deltamem_vllm.doctor.asked import Asked\n"
        f"from deltamem_vllm.doctor.checks.{module} import {check}\n"
        f"print(json.dumps([dataclasses.asdict(finding) for finding in {check}(Asked())]))"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    done = subprocess.run(
        [python, "-P", "-c", code],
        env=inherited | ({"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Finding(**one) for one in json.loads(done.stdout)]


def add_distribution(
    folder: Path, name: str, version: str, files: Iterable[str] = (), entry_points: str = "", metadata: str = ""
) -> None:
    """Install the metadata of a distribution into a folder; its files are listed and not made."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points)


def python_without(folder: Path, *prefixes: str) -> str:
    """The interpreter of a new environment with all that is installed here, but for what starts with a prefix."""
    venv.create(folder, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    there = folder / "lib" / version / "site-packages"
    for one in Path(sysconfig.get_path("purelib")).iterdir():
        if not one.name.startswith(prefixes):
            (there / one.name).symlink_to(one)
    return str(folder / "bin" / "python")
