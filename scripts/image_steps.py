# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Carries out a Dockerfile's instructions in a folder. See scripts/check_cpu_image.py."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dockerfile import Instruction, commands, expand, parse
from image_base import StepFailed, base_python, give, hard_copy, unpack_debian

IMAGE_FOLDERS = ("/build", "/home", "/opt", "/root", "/var/lib/apt")
"""Folders of the image that its steps may write to; paths in them are moved below the stage's root."""
READ_ONLY = ("/usr/sbin/nologin",)
"""Other absolute paths that may be named: nothing is written there."""
_PATH = re.compile(r"(?<![\w:./}])(/[a-z][\w./-]*)")
_INHERITED = ("PIP_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
# Copied as .dockerignore has it: what is built is built anew.
_IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")


class Image:
    """An image in the making.

    Parameters
    ----------
    context
        The build context: the repository.
    folder
        An empty folder for everything.
    build_args
        Values for ARG instructions, instead of their defaults.
    """

    def __init__(self, context: Path, folder: Path, build_args: Mapping[str, str]) -> None:
        self.context = context
        self.folder = folder
        self.root = folder / "root"
        self.stages = folder / "stages"
        self.system = folder / "system"
        self.build_args = dict(build_args)
        self.global_args: dict[str, str] = {}
        self.args: dict[str, str] = {}
        self.env: dict[str, str] = {}
        self.stage_env: dict[str, dict[str, str]] = {}
        self.stage = ""
        self.workdir = "/"
        self.user = 0
        self.entrypoint: list[str] = []
        self.command: list[str] = []
        self.health: list[str] = []
        self.homes: dict[int, Path] = {}
        self.notes: list[str] = []

    def build(self, text: str) -> None:
        """Carry out all instructions; prints each with the seconds it took."""
        for step in parse(text):
            began = time.monotonic()
            print(f"{step.line:4} {step.keyword} {step.value[:110]}", flush=True)
            HANDLERS[step.keyword](self, step)
            while self.notes:
                print(f"       {self.notes.pop(0)}", flush=True)
            if (took := time.monotonic() - began) > 1:
                print(f"       {took:.0f} s", flush=True)

    # Paths and variables.

    def move(self, text: str) -> str:
        """The text with the image's folders below the stage's root.

        Raises
        ------
        StepFailed
            It names another absolute path: the step would read or write this machine's own files.
        """

        def moved(match: re.Match[str]) -> str:
            path = match[1]
            if any(path == folder or path.startswith(f"{folder}/") for folder in IMAGE_FOLDERS):
                return f"{self.root}{path}"
            if path in READ_ONLY or Path(path).is_relative_to(self.root.parent):
                return path
            raise StepFailed(f"{path} is in none of {', '.join(IMAGE_FOLDERS)}: {text}")

        return _PATH.sub(moved, text)

    def variables(self) -> dict[str, str]:
        """What `${...}` may name here: ENV before ARG."""
        return {**self.args, **self.env}

    def environment(self) -> dict[str, str]:
        """The environment of the image's processes, its paths moved."""
        moved = {name: self.move(value) if name != "PATH" else value for name, value in self.env.items()}
        found = [*self.system.rglob("*.so.*"), *(self.folder / "python" / "lib").glob("*.so.*")]
        libraries = sorted({str(file.parent) for file in found})
        return moved | ({"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {})

    # Instructions.

    def from_(self, step: Instruction) -> None:
        """Begin a stage: a copy of an earlier one, or an empty folder with this machine's Python."""
        self._set_aside()
        words = expand(step.value, self.global_args).split()
        base, name = words[0], words[2] if len(words) == 3 else ""
        self.stage, self.args, self.workdir, self.user = name, {}, "/", 0
        if (self.stages / base).exists():
            hard_copy(self.stages / base, self.root)
            self.env = dict(self.stage_env[base])
            return
        python = base_python(base, self.folder)
        self.root.mkdir(parents=True)
        self.env = {"PATH": f"{python}:/usr/bin:/bin", "HOME": "/root"}
        self.notes.append(f"stands for it: {python}/python")

    def _set_aside(self) -> None:
        if self.root.exists():
            self.stages.mkdir(exist_ok=True)
            self.root.rename(self.stages / self.stage)
            self.stage_env[self.stage] = self.env

    def arg(self, step: Instruction) -> None:
        """Declare a variable of the build."""
        name, _, default = step.value.partition("=")
        scope = self.args if self.stage else self.global_args
        scope[name] = self.build_args.get(name, expand(default, {**self.global_args, **scope}))

    def env_(self, step: Instruction) -> None:
        """Set variables; of PATH, whose other parts are this machine's, the image's parts are moved at once."""
        new = {name: expand(value, self.variables()) for name, value in step.assignments().items()}
        if "PATH" in new:
            own = new["PATH"].removesuffix(self.env["PATH"])
            new["PATH"] = self.move(own) + self.env["PATH"]
        self.env |= new

    def copy(self, step: Instruction) -> None:
        """Copy from the context or from a stage, as Docker does: a folder's contents, not the folder."""
        *sources, target = step.value.split()
        stage = step.flag("from")
        begins = self.stages / stage if stage else self.context
        destination = Path(self.move(str(Path(self.workdir, target))))
        into = target.endswith("/") or target == "." or len(sources) > 1
        for source in sources:
            found = begins / source.lstrip("/")
            if not found.exists() and not found.is_symlink():
                raise StepFailed(
                    f"line {step.line}: COPY {source}: not in {'stage ' + stage if stage else 'the context'}"
                )
            place = destination / found.name if into and not found.is_dir() else destination
            place.parent.mkdir(parents=True, exist_ok=True)
            if stage:
                hard_copy(found, place)
            elif found.is_dir():
                shutil.copytree(found, place, ignore=_IGNORED, dirs_exist_ok=True)
            else:
                shutil.copy2(found, place)

    def run(self, step: Instruction) -> None:
        """Run the commands, except for those that would change this machine (see `SYSTEM`)."""
        for name, value in step.flags:
            # A cache is this machine's own; anything else would have to be carried out.
            if name != "mount" or not value.startswith("type=cache,"):
                raise StepFailed(f"line {step.line}: --{name}={value}: only cache mounts can be left out")
        for command in commands(step.value):
            program = command.split()[0]
            if program in SYSTEM:
                SYSTEM[program](self, shlex.split(command))
                continue
            inherited = {name: value for name, value in os.environ.items() if name.startswith(_INHERITED)}
            done = subprocess.run(
                ["/bin/sh", "-c", self.move(command)],
                # ARGs are variables of the commands, too; their values are no paths of the image.
                env=inherited | self.args | self.environment() | {"PIP_CACHE_DIR": str(_pip_cache())},
                cwd=self.move(self.workdir) if self.workdir != "/" else self.root,
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise StepFailed(f"line {step.line}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")

    def set_workdir(self, step: Instruction) -> None:
        """Go to a folder, which is made."""
        self.workdir = step.value
        Path(self.move(step.value)).mkdir(parents=True, exist_ok=True)

    def set_user(self, step: Instruction) -> None:
        """Who the server runs as: a number, so that Kubernetes can tell that it is not root."""
        self.user = int(step.value.split(":")[0])

    def remember(self, step: Instruction) -> None:
        """Keep what the container's start needs."""
        if step.keyword == "ENTRYPOINT":
            self.entrypoint = step.words()
        elif step.keyword == "CMD":
            self.command = step.words()
        else:
            self.health = Instruction(step.line, "CMD", step.value.removeprefix("CMD").strip()).words()

    def declare(self, step: Instruction) -> None:
        """Labels, ports and volumes change no file."""

    # Commands that would change this machine.

    def packages(self, words: list[str]) -> None:
        """`apt-get`: libraries are unpacked beside the image, programs must be on this machine."""
        for package in [word for word in words[2:] if not word.startswith("-")]:
            if package.startswith("lib"):
                unpack_debian(package, self.system)
                self.notes.append(f"{package}: unpacked from Debian's package")
            elif shutil.which(package) is None:
                raise StepFailed(f"this machine has no {package}; Debian and Ubuntu: apt-get install {package}")
            else:
                self.notes.append(f"{package}: this machine's")

    def account(self, words: list[str]) -> None:
        """`useradd`: no account, but its home."""
        if words[0] == "useradd":
            options = dict(zip(words[1:], words[2:], strict=False))
            home = Path(self.move(options["--home-dir"]))
            home.mkdir(parents=True, exist_ok=True)
            give(home, int(options["--uid"]))
            self.homes[int(options["--uid"])] = home
        self.notes.append(f"{words[0]}: no account is made; its number is used")

    def install(self, words: list[str]) -> None:
        """`install --directory --owner N --group N FOLDER`."""
        folder = Path(self.move(words[-1]))
        folder.mkdir(parents=True, exist_ok=True)
        give(folder, int(words[words.index("--owner") + 1]))


HANDLERS: dict[str, Callable[[Image, Instruction], None]] = {
    "ARG": Image.arg,
    "CMD": Image.remember,
    "COPY": Image.copy,
    "ENTRYPOINT": Image.remember,
    "ENV": Image.env_,
    "EXPOSE": Image.declare,
    "FROM": Image.from_,
    "HEALTHCHECK": Image.remember,
    "LABEL": Image.declare,
    "RUN": Image.run,
    "USER": Image.set_user,
    "VOLUME": Image.declare,
    "WORKDIR": Image.set_workdir,
}
SYSTEM: dict[str, Callable[[Image, list[str]], None]] = {
    "apt-get": Image.packages,
    "groupadd": Image.account,
    "install": Image.install,
    "useradd": Image.account,
}
"""Commands that change the machine that they run on, and what is done instead."""


def _pip_cache() -> Path:
    return Path(os.environ.get("PIP_CACHE_DIR", Path.home() / ".cache" / "pip"))
