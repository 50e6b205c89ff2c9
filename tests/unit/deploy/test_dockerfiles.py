# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The two Dockerfiles: linted, pinned, without secrets, not root; and made of steps that the CPU check carries out."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from deltamem_vllm.versions import SUPPORTED_VLLM
from tests.support.deploy import DOCKER, DOCKERFILES, ROOT, script, tool

dockerfile = script("dockerfile")
image_steps = script("image_steps")
both = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def steps(path: Path) -> list[Any]:
    return list(dockerfile.parse(path.read_text()))


def only(path: Path, keyword: str) -> Any:
    """The last stage's only instruction of a kind."""
    found = steps(path)
    last = max(at for at, step in enumerate(found) if step.keyword == "FROM")
    (step,) = [step for step in found[last:] if step.keyword == keyword]
    return step


@both
def test_hadolint_finds_nothing(path: Path) -> None:
    done = tool("hadolint", "--failure-threshold", "style", path)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /tmp && pip install torch\n")
    done = tool("hadolint", bad)
    assert done.returncode == 1
    assert {"DL3003", "DL3007", "DL3013"} <= set(re.findall(r"DL\d+", done.stdout))


@both
def test_every_line_is_read_and_every_instruction_is_carried_out(path: Path) -> None:
    found = steps(path)
    assert {step.keyword for step in found} <= set(image_steps.HANDLERS)
    # Without this module's help: each line is a comment, begins an instruction or continues one.
    lines = [line.strip() for line in path.read_text().splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    begins = [line for before, line in zip(["", *lines], lines, strict=False) if not before.endswith("\\")]
    assert [line.split()[0] for line in begins] == [step.keyword for step in found]
    words = sum((re.sub(r"\s\\$", "", line).split() for line in lines), [])
    read = sum(
        ([step.keyword, *(f"--{name}={value}" for name, value in step.flags), *step.value.split()] for step in found),
        [],
    )
    assert words == read


def test_every_command_of_the_cpu_image_can_be_carried_out(tmp_path: Path) -> None:
    image = image_steps.Image(ROOT, tmp_path, {})
    ran, replaced = [], []
    for step in steps(DOCKERFILES[1]):
        if step.keyword != "RUN":
            continue
        assert all(name == "mount" and value.startswith("type=cache,") for name, value in step.flags)
        for command in dockerfile.commands(step.value):
            (replaced if command.split()[0] in image_steps.SYSTEM else ran).append(command)
            moved = image.move(command)
            # Nothing of this machine is written to: every absolute path is below the image's root, or is not written.
            paths = re.findall(r"(?<![\w:./}])/[a-z][\w./-]*", moved)
            assert all(name.startswith(str(tmp_path)) or name in image_steps.READ_ONLY for name in paths), moved
    assert {command.split()[0] for command in ran} >= {"pip", "python", "ln"}
    assert {command.split()[0] for command in replaced} == {"apt-get", "groupadd", "useradd", "install"}


@both
def test_base_images_are_pinned_and_take_a_digest(path: Path) -> None:
    arguments = {}
    for step in steps(path):
        if step.keyword == "ARG":
            name, _, default = step.value.partition("=")
            arguments.setdefault(name, default)
    bases = [step.value.split()[0] for step in steps(path) if step.keyword == "FROM"]
    names = {step.value.split()[2] for step in steps(path) if step.keyword == "FROM"}
    outside = [base for base in bases if base not in names]
    assert outside
    for base in outside:
        plain = dockerfile.expand(base, arguments)
        assert re.fullmatch(r"(python:3\.11\.\d+-slim-bookworm|vllm/vllm-openai:v\d+\.\d+\.\d+)", plain)
        digests = {name: "sha256:" + "0" * 64 for name in arguments if name.endswith("_DIGEST")}
        assert dockerfile.expand(base, arguments | digests) == f"{plain}@sha256:{'0' * 64}"


def test_the_gpu_image_is_of_the_supported_vllm() -> None:
    (version,) = re.findall(r"^ARG VLLM_VERSION=(\S+)$", DOCKERFILES[0].read_text(), re.MULTILINE)
    assert version in SpecifierSet(SUPPORTED_VLLM)
    assert (
        f"vllm-openai:v{version}" in only(DOCKERFILES[0], "LABEL").assignments()["org.opencontainers.image.base.name"]
    )


def test_the_cpu_image_installs_what_the_makefile_does() -> None:
    (torch,) = re.findall(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"ARG TORCH_VERSION={torch}\n" in DOCKERFILES[1].read_text()
    locked = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    (setuptools,) = [line for line in locked if line.startswith("setuptools==")]
    assert f"pip install {setuptools}\n" in DOCKERFILES[0].read_text()


@both
def test_the_server_is_not_root_and_says_so_in_a_number(path: Path) -> None:
    # A name would do for Docker, but Kubernetes' runAsNonRoot can only check a number.
    users = [at for at, step in enumerate(steps(path)) if step.keyword == "USER"]
    assert steps(path)[users[-1]].value == "10001:10001"
    after = [step.keyword for step in steps(path)[users[-1] :]]
    assert "RUN" not in after and "COPY" not in after


@both
def test_health_and_start_need_no_shell(path: Path) -> None:
    assert only(path, "ENTRYPOINT").words() == ["vllm", "serve"]
    assert only(path, "HEALTHCHECK").value.startswith('CMD ["python')
    assert "/health" in only(path, "HEALTHCHECK").value
    assert only(path, "EXPOSE").value == "8000"


@both
def test_what_is_written_at_run_time_lies_in_the_volume(path: Path) -> None:
    assert only(path, "VOLUME").words() == ["/home/deltamem/.cache"]
    folders = {name: value for name, value in only(path, "ENV").assignments().items() if value.startswith("/")}
    assert {"HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(folders)
    assert all(value.startswith("/home/deltamem") for value in folders.values())


@both
def test_no_secret_is_asked_for_or_kept(path: Path) -> None:
    names = [step.value.split("=")[0] for step in steps(path) if step.keyword == "ARG"]
    for step in steps(path):
        names += step.assignments() if step.keyword in ("ENV", "LABEL") else []
    assert names
    assert [name for name in names if re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", name, re.IGNORECASE)] == []


@both
def test_the_context_has_what_is_copied_and_nothing_else(path: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    admitted = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*", "everything stays out that is not named"
    sources: list[str] = []
    for step in steps(path):
        if step.keyword == "COPY" and step.flag("from") is None:
            sources += step.value.split()[:-1]
    assert {source.split("/")[0] for source in sources} <= admitted
    assert all((ROOT / source).exists() for source in sources)
    # A library that was built here would hide that the image did not build its own.
    for built in ("deltamem_vllm/_native.so", "deltamem_vllm/__pycache__", "deltamem_vllm.egg-info"):
        assert any(fnmatch(f"x/{built}", rule.replace("**", "*")) for rule in rules), built


def test_the_native_library_runs_on_the_oldest_system_that_vllm_is_shipped_for() -> None:
    # The GPU image's wheel is built on Debian 12 and installed on Ubuntu 22.04 (glibc 2.35) or newer.
    library = next((ROOT / "deltamem_vllm").glob("_native.so"), None)
    if library is None:
        pytest.skip("the native library is not built (make native)")
    needed = {int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())}
    assert needed and max(needed) <= 35


def test_nothing_else_in_docker_builds_an_image() -> None:
    assert {path for path in DOCKER.glob("Dockerfile*")} == set(DOCKERFILES)
