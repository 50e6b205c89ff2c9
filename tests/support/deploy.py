# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the tests of docker/ and configs/serve/ share: where things are, the scripts' modules, the tools."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")
SERVE = sorted((ROOT / "configs" / "serve").glob("*.yaml"))


def script(name: str) -> ModuleType:
    """A module of scripts/, which import each other by their bare names."""
    folder = str(ROOT / "scripts")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def tool(*words: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program that requirements/dev.txt installs beside this Python.

    `environment` replaces this process's, but for what finds programs and homes.
    """
    program = Path(sys.executable).with_name(str(words[0]))
    assert program.exists(), f"{program} is missing: make test installs requirements/dev.txt"
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [program, *words[1:]],
        env=None if environment is None else kept | dict(environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def read_yaml(path: Path) -> Any:
    """The only document of a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))
