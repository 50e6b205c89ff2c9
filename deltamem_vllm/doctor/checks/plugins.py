# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Entry points: does vLLM find and load us, and do the scorers of other packages load."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.versions import is_installed
from deltamem_vllm.doctor.findings import Finding

NAME = "plugins"
GROUP = "vllm.general_plugins"
OURS = "deltamem"
_AGAIN = "reinstall deltamem-vllm: pip install --force-reinstall --no-deps deltamem-vllm, or `make demo` in a checkout"


def check_plugins(asked: Asked) -> Iterator[Finding]:
    """Our entry point is there, once, loadable, not hidden, and does its work in vLLM."""
    points = entry_points(group=GROUP)
    ours = [point for point in points if point.value == "deltamem_vllm.plugin:register"]
    same_name = {point.value for point in points if point.name == OURS}
    if not ours:
        yield Finding(NAME, "error", f"no entry point of group {GROUP} leads to deltamem", _AGAIN)
        return
    if len(same_name) > 1:
        yield Finding(
            NAME,
            "warning",
            f"several entry points are called {OURS!r}: {', '.join(sorted(same_name))}",
            "uninstall the package that the other one belongs to (pip list shows what is installed)",
        )
    yield from _hidden(asked.environment.get("VLLM_PLUGINS"))
    try:
        ours[0].load()
    except Exception as error:
        # Whatever the import of our own package raises: it is what vLLM would meet.
        yield Finding(NAME, "error", f"{ours[0].value} cannot be loaded: {type(error).__name__}: {error}", _AGAIN)
        return
    others = sorted({point.name for point in points} - {OURS})
    if others:
        yield Finding(NAME, "note", f"other plugins that vLLM loads: {', '.join(others)}")
    yield from _in_vllm(asked)


def check_scorers(asked: Asked) -> Iterator[Finding]:
    """Every scorer that packages offer can be used."""
    found = asked.torch_facts.get("scorers")
    for name, broken in found.items():
        if broken is not None:
            yield Finding(
                "scorers", "warning", f"{name} cannot be used: {broken}", "update or uninstall the package it is from"
            )
    yield Finding("scorers", "ok", ", ".join(name for name, broken in found.items() if broken is None))


def _hidden(chosen: str | None) -> Iterator[Finding]:
    # vLLM splits at commas and compares names as they are.
    if chosen is not None and OURS not in chosen.split(","):
        yield Finding(
            NAME,
            "error",
            f"VLLM_PLUGINS={chosen!r} keeps vLLM from loading deltamem: it would not know --kv-cache-policy",
            "unset VLLM_PLUGINS, or add deltamem to it: VLLM_PLUGINS=" + ",".join(filter(None, [chosen, OURS])),
        )


def _in_vllm(asked: Asked) -> Iterator[Finding]:
    if not is_installed():
        yield Finding(NAME, "ok", f"entry point {OURS} of {GROUP}; not tried, vLLM is not installed")
    elif asked.vllm_facts.get("plugin"):
        yield Finding(NAME, "ok", f"vLLM loads entry point {OURS} and knows --kv-cache-policy")
    else:
        yield Finding(
            NAME,
            "error",
            "vLLM does not know --kv-cache-policy after it has loaded its plugins",
            "see the other findings on VLLM_PLUGINS and vLLM; `VLLM_LOGGING_LEVEL=DEBUG vllm serve --help` says more",
        )
