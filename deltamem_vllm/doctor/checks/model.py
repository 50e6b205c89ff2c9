# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Whether the policy serves a model, by the gate that a server goes through."""

from __future__ import annotations

from collections.abc import Iterator

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.versions import is_installed
from deltamem_vllm.doctor.findings import Finding
from deltamem_vllm.doctor.models import how_to_get

NAME = "model"


def check_model(asked: Asked) -> Iterator[Finding]:
    """Refused or served, with the default configuration."""
    if asked.model is None:
        yield Finding(NAME, "note", "not checked: no model was named", "deltamem doctor --model MODEL")
        return
    if not is_installed():
        yield Finding(NAME, "note", "not checked: vLLM is not installed")
        return
    told = asked.vllm_facts.get("model")
    if not told["is_here"]:
        yield Finding(NAME, "warning", f"not checked: {asked.model} is not on this machine", how_to_get(asked.model))
    elif "refused" in told:
        yield Finding(NAME, "error", told["refused"], "use another model, or vLLM without the policy")
    elif "fault" in told:
        yield Finding(NAME, "error", told["fault"], "see the message, and the findings above")
    else:
        settings = ", ".join(f"{name} {value}" for name, value in told["config"].items())
        yield Finding(
            NAME,
            "ok",
            f"{asked.model} ({told['architecture']}) passes the checks before a server loads it; defaults: {settings}",
        )
