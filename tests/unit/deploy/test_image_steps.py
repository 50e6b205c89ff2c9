# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Reading a Dockerfile, and carrying it out in a folder: what scripts/check_cpu_image.py stands on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.deploy import script

dockerfile = script("dockerfile")
image_steps = script("image_steps")
StepFailed = script("image_base").StepFailed
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python that stands for a base image, copied once."""
    folder = tmp_path_factory.mktemp("base")
    script("image_base").base_python(f"python:{PYTHON}-slim", folder)
    return folder / "python"


@pytest.fixture
def built(tmp_path: Path, python: Path) -> Callable[..., Any]:
    """Makes the image of a Dockerfile whose context is tmp_path/context."""

    def build(text: str, **build_args: str) -> Any:
        context, folder = tmp_path / "context", tmp_path / "image"
        context.mkdir(exist_ok=True)
        folder.mkdir()
        if python.exists():  # one in /usr is used where it is
            (folder / "python").symlink_to(python)
        image = image_steps.Image(context, folder, build_args)
        image.build(text)
        return image

    return build


def test_instructions_are_joined_and_know_their_line() -> None:
    found = dockerfile.parse(
        "# a comment\nFROM x AS y\n\nRUN --mount=type=cache,target=/c \\\n  # why\n    a \\\n    && b\n"
    )
    assert [(step.line, step.keyword, step.value) for step in found] == [(2, "FROM", "x AS y"), (4, "RUN", "a && b")]
    assert found[1].flag("mount") == "type=cache,target=/c"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("FROM x\nONBUILD RUN y\n", "line 2: instruction 'ONBUILD' is not one of ARG, CMD"),
        ("RUN <<EOF\nx\nEOF\n", "line 1: here-documents are not read"),
        ("RUN x \\\n", "line 1: the file ends inside 'RUN x'"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, words: str) -> None:
    with pytest.raises(dockerfile.DockerfileError, match=words):
        dockerfile.parse(text)


def test_shell_form_is_refused_where_signals_matter() -> None:
    (step,) = dockerfile.parse("CMD vllm serve\n")
    with pytest.raises(dockerfile.DockerfileError, match=r'write CMD \["program"'):
        step.words()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$A ${A}", "1 1"),
        ("x${D:+@${D}}", "x"),
        ("x${A:+@${A}}", "x@1"),
        ("${D:-else}", "else"),
        ('${A:+--url "${A}"}', '--url "1"'),
        ("$UNKNOWN.", "."),
    ],
)
def test_variables(text: str, expected: str) -> None:
    assert dockerfile.expand(text, {"A": "1", "D": ""}) == expected


def test_assignments() -> None:
    (step,) = dockerfile.parse('ENV A=1 \\\n    B="two words" C=${A}\n')
    assert step.assignments() == {"A": "1", "B": "two words", "C": "${A}"}


def test_commands_are_split_outside_of_quotes_and_parentheses() -> None:
    assert dockerfile.commands("a 'x && y' && b $(c && d) && e") == ["a 'x && y'", "b $(c && d)", "e"]


def test_a_stage_gets_what_is_copied_and_nothing_else(built: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "one.txt").write_text("1")
    (tmp_path / "context" / "sub").mkdir()
    (tmp_path / "context" / "sub" / "built.so").write_text("old")
    (tmp_path / "context" / "sub" / "two.txt").write_text("2")
    image = built(
        f"""
ARG V={PYTHON}.1
FROM python:${{V}}-slim AS base
ENV WORD=base
FROM base AS build
ARG NUMBER=1
WORKDIR /build
COPY one.txt ./
COPY sub sub
RUN mkdir /opt && echo $WORD $NUMBER > /opt/made && touch /opt/left
FROM base AS runtime
COPY --from=build /opt/made /opt/made
ENV WHERE=/opt/made
USER 10001:10001
WORKDIR /home/x
CMD ["/opt/made"]
""",
        NUMBER="7",
    )
    root = image.root
    assert (root / "opt" / "made").read_text() == "base 7\n"
    assert not (root / "opt" / "left").exists() and not (root / "build").exists()
    build = tmp_path / "image" / "stages" / "build" / "build"
    assert sorted(path.name for path in build.rglob("*.*")) == ["one.txt", "two.txt"]
    assert image.environment()["WHERE"] == str(root / "opt" / "made")
    assert (image.user, image.command) == (10001, ["/opt/made"])


@pytest.mark.parametrize(
    ("instructions", "words"),
    [
        ("RUN touch /etc/passwd", "/etc/passwd is in none of /build, /home"),
        ("RUN rm -rf /tmp/x", "/tmp/x is in none of"),
        ("RUN --mount=type=bind,source=/x,target=/y true", "only cache mounts can be left out"),
        ("RUN echo before && false", "line 2: false"),
        ("COPY absent.txt ./", "COPY absent.txt: not in the context"),
        ("RUN apt-get install --yes deltamem-no-such-program", "this machine has no deltamem-no-such-program"),
    ],
)
def test_a_step_that_fails_or_reaches_outside_stops_the_check(
    built: Callable[..., Any], instructions: str, words: str
) -> None:
    with pytest.raises(StepFailed, match=words):
        built(f"FROM python:{PYTHON}.1-slim AS only\n{instructions}\n")


def test_another_python_is_no_stand_in(built: Callable[..., Any]) -> None:
    with pytest.raises(StepFailed, match=f"python:2.7-slim is no python:{PYTHON}"):
        built("FROM python:2.7-slim AS only\n")


@pytest.mark.parametrize("also", [True, False])
def test_the_systems_own_python_may_be_called_python3_only(
    also: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = script("image_base")
    system, folder = tmp_path / "usr", tmp_path / "image"
    (system / "bin").mkdir(parents=True)
    for name in (f"python{PYTHON}", "python")[: 1 + also]:
        (system / "bin" / name).symlink_to(sys.executable)
    monkeypatch.setattr(base, "SYSTEM_PREFIXES", (str(system),))
    monkeypatch.setattr(sys, "base_prefix", str(system))
    for _ in range(2):  # a second time it is there already
        found = base.base_python(f"python:{PYTHON}-slim", folder)
        assert found == (system if also else folder / "python") / "bin"
        assert (found / "python").resolve() == Path(sys.executable).resolve()


def test_the_commands_see_no_environment_of_this_process(
    built: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_STRAY", "1")
    image = built(f"FROM python:{PYTHON}-slim AS only\nWORKDIR /opt\nRUN env > seen\n")
    seen = (image.root / "opt" / "seen").read_text()
    assert "VLLM_STRAY" not in seen and "PATH=" in seen


def test_a_home_is_made_for_the_account(built: Callable[..., Any]) -> None:
    image = built(
        f"FROM python:{PYTHON}-slim AS only\nRUN useradd --uid 10001 --gid 10001 --create-home --home-dir /home/x x "
        "&& install --directory --owner 10001 --group 10001 /home/x/.cache\n",
    )
    folder = image.root / "home" / "x" / ".cache"
    assert folder.is_dir()
    assert folder.stat().st_uid == (10001 if os.geteuid() == 0 else os.geteuid())
