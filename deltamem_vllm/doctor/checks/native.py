# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The native CPU library: there, loadable, of this version, and right."""

from __future__ import annotations

from collections.abc import Iterator

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.versions import build
from deltamem_vllm.doctor.findings import Finding

NAME = "native library"
_MEND = (
    "run `make native` in the checkout, or reinstall the package where there is a C++ compiler "
    "(pip install --force-reinstall --no-deps ...)"
)


def check_native(asked: Asked) -> Iterator[Finding]:
    """Presence, interface, instruction set, and its operations against their definitions."""
    told = asked.torch_facts.get("native")
    if not told["there"]:
        yield Finding(
            NAME,
            # Nothing on a GPU comes this way.
            "note" if build() == "cuda" else "warning",
            f"{told['path']} is missing: operations on a CPU run in plain torch, several times slower, and cold pages "
            "are off",
            _MEND,
        )
        return
    isa, supported = told["isa"], told["supported"]
    if isa != supported[-1]:
        yield Finding(
            NAME, "note", f"DELTAMEM_ISA={isa} uses less than the machine has ({supported[-1]})", "unset DELTAMEM_ISA"
        )
    results = asked.torch_facts.get("self_test")
    for operation, fault in results.items():
        if fault:
            yield Finding(NAME, "error", f"self-test of {operation} with {isa}: {fault}", _MEND)
    if not any(results.values()):
        yield Finding(NAME, "ok", f"interface {told['abi']}, {isa}; self-test right: {', '.join(results)}")


def check_openmp(asked: Asked) -> Iterator[Finding]:
    """One OpenMP runtime for torch and the library: two would each take all cores."""
    runtimes = asked.torch_facts.get("openmp")
    if len(runtimes) > 1:
        yield Finding(
            "OpenMP",
            "warning",
            f"{len(runtimes)} runtimes in one process: {', '.join(runtimes)}; each takes all cores",
            "preload only one of them: look at LD_PRELOAD",
        )
    elif runtimes:
        yield Finding("OpenMP", "ok", f"one runtime for torch and the native library: {runtimes[0]}")
    else:
        yield Finding("OpenMP", "note", "torch has loaded no OpenMP runtime")
