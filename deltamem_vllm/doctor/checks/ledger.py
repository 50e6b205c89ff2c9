# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Every name of vLLM that deltamem relies on is as it was when deltamem was written."""

from __future__ import annotations

from collections.abc import Iterator

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.versions import INSTALL, is_installed
from deltamem_vllm.doctor.findings import Finding

NAME = "patch ledger"


def check_ledger(asked: Asked) -> Iterator[Finding]:
    """The signatures in the patch ledger against the installed vLLM."""
    if not is_installed():
        yield Finding(NAME, "note", "not checked: vLLM is not installed")
        return
    told = asked.vllm_facts.get("ledger")
    if told["fault"] is None:
        yield Finding(NAME, "ok", f"all {told['names']} names in vLLM are as expected")
    else:
        yield Finding(NAME, "error", told["fault"], f"install an unmodified supported vLLM: {INSTALL}")
