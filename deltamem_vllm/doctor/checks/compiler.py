# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A C++ compiler with Python's headers: torch.compile and Triton build with it while a server starts."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding

NAME = "compiler"
_PROGRAM = b"#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>{0}[0]; }\n"
_MEND = (
    "install one with Python's headers (Debian and Ubuntu: apt-get install g++ python3-dev) or name one in CXX; "
    "--enforce-eager does without torch.compile"
)


def check_compiler(asked: Asked) -> Iterator[Finding]:
    """The compiler is there and reads Python.h and the standard library."""
    named = asked.environment.get("CXX")
    candidates = [shlex.split(named)] if named else [["g++"], ["c++"], ["clang++"]]
    path = asked.environment.get("PATH")
    command = next((one for one in candidates if one and shutil.which(one[0], path=path)), None)
    if command is None:
        tried = " or ".join(shlex.join(one) for one in candidates)
        yield Finding(NAME, "warning", f"no C++ compiler: {tried} is not on the PATH", _MEND)
        return
    include = sysconfig.get_path("include")
    tried_out = subprocess.run(
        [*command, "-x", "c++", "-std=c++17", "-fsyntax-only", f"-I{include}", "-"],
        input=_PROGRAM,
        capture_output=True,
        timeout=60,
        check=False,
        env=dict(asked.environment),
    )
    if tried_out.returncode:
        said = tried_out.stderr.decode(errors="replace").strip().splitlines()
        yield Finding(
            NAME,
            "warning",
            f"{shlex.join(command)} cannot compile against {include}: {said[0] if said else 'it said nothing'}",
            _MEND,
        )
    else:
        yield Finding(NAME, "ok", f"{shlex.join(command)} compiles against Python's headers")
