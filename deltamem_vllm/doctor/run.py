# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""All checks, one after the other; one that fails does not keep the others from running."""

from __future__ import annotations

from collections.abc import Iterable

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks import CHECKS, Check
from deltamem_vllm.doctor.checks.versions import is_installed
from deltamem_vllm.doctor.children import FactMissing
from deltamem_vllm.doctor.findings import Finding

_REPORT = "report it with the block that `deltamem doctor --report` prints, unless the message says what is wrong"

_FIRST = "mend what the message says, and what is found of vLLM and torch above; then run this again"


def examine(asked: Asked, checks: Iterable[Check] = CHECKS) -> list[Finding]:
    """What the checks find, in their order."""
    try:
        # Both at once, and while the other checks run: importing vLLM takes most of the time.
        started = [asked.torch_facts, *([asked.vllm_facts] if is_installed() else [])]
        assert started
        return [finding for check in checks for finding in _findings(check, asked)]
    finally:
        asked.close()


def _findings(check: Check, asked: Asked) -> list[Finding]:
    found: list[Finding] = []
    try:
        # One by one: what was found before the check failed is kept.
        found.extend(check(asked))
    except FactMissing as error:
        # The child could not tell: most often for want of vLLM or torch, which has a finding of its own.
        found.append(Finding(_name(check), "error", f"could not be looked at: {error}", _FIRST))
    except Exception as error:
        # A check that fails has met something that nobody thought of, and that is worth a finding, not an end.
        found.append(Finding(_name(check), "error", f"the check failed: {type(error).__name__}: {error}", _REPORT))
    return found


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")
