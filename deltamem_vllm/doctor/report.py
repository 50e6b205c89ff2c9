# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Findings for people, for scripts, and for bug reports."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final

from deltamem_vllm import __version__
from deltamem_vllm.doctor.findings import LEVELS, Finding, Level, passed, worst
from deltamem_vllm.doctor.privacy import Redactor

if TYPE_CHECKING:
    from rich.table import Table

_STYLES: Final[dict[Level, str]] = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def redacted(findings: Sequence[Finding], redactor: Redactor) -> list[Finding]:
    """The findings as they may be shown."""
    return [
        replace(finding, found=redactor.text(finding.found), mend=redactor.text(finding.mend)) for finding in findings
    ]


def as_table(findings: Sequence[Finding]) -> Table:
    """One row a finding; what to do stands under what was found."""
    from rich.table import Table
    from rich.text import Text

    table = Table("level", "what", "found", box=None, pad_edge=False)
    for finding in findings:
        # Text, not markup: messages have brackets.
        cell = Text(finding.found)
        if finding.mend:
            cell.append(f"\n-> {finding.mend}", style="bold" if finding.level in ("warning", "error") else "dim")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), Text(finding.check), cell)
    return table


def summary(findings: Sequence[Finding]) -> str:
    """How many there are of each level."""
    count = Counter(finding.level for finding in findings)
    return ", ".join(f"{count[level]} {level}" for level in reversed(LEVELS) if count[level])


def as_json(findings: Sequence[Finding], redactor: Redactor, strict: bool) -> str:
    """An object: version, worst level, whether it passed, findings, environment."""
    return json.dumps(
        {
            "deltamem": __version__,
            "worst": worst(findings),
            "passed": passed(findings, strict),
            "findings": [asdict(finding) for finding in findings],
            "environment": redactor.environment(),
        },
        indent=1,
    )


def as_bug_report(findings: Sequence[Finding], redactor: Redactor) -> str:
    """A Markdown block to paste: every finding on its line, and the variables that matter."""
    lines = ["```text", f"deltamem doctor {__version__}: {summary(findings)}"]
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.check}: " + " / ".join(finding.found.splitlines()))
    variables = redactor.environment()
    lines += [f"{name}={value}" for name, value in variables.items()] or ["no environment variable of interest is set"]
    return "\n".join([*lines, "```"])
