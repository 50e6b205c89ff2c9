# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Findings, what decides the exit status, and what is printed of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from deltamem_vllm import __version__
from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding, passed, worst
from deltamem_vllm.doctor.privacy import SHOWN, Redactor
from deltamem_vllm.doctor.report import as_bug_report, as_json, as_table, redacted, summary
from deltamem_vllm.doctor.run import examine

OK = Finding("a", "ok", "fine")
NOTE = Finding("b", "note", "by the way")
WARNING = Finding("c", "warning", "slow", "do this")
ERROR = Finding("d", "error", "broken [bold]", "do that")


@pytest.mark.parametrize(
    ("findings", "level", "plain", "strict"),
    [
        ([], "ok", True, True),
        ([OK, NOTE], "note", True, True),
        ([WARNING, OK], "warning", True, False),
        ([OK, ERROR, WARNING], "error", False, False),
    ],
)
def test_errors_fail_and_warnings_only_if_asked(findings, level, plain, strict) -> None:
    assert worst(findings) == level
    assert (passed(findings, False), passed(findings, True)) == (plain, strict)


def test_a_fault_without_a_mend_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="how to mend it"):
        Finding("x", "error", "broken")


def test_a_check_that_fails_is_a_finding_and_the_others_go_on() -> None:
    def check_first(asked: Asked):
        yield OK
        raise ZeroDivisionError("by nought")

    def check_second(asked: Asked):
        yield NOTE

    findings = examine(Asked(), [check_first, check_second])
    assert [finding.level for finding in findings] == ["ok", "error", "note"]
    assert findings[1].check == "first"
    assert "ZeroDivisionError: by nought" in findings[1].found


def test_a_table_shows_everything_as_it_is() -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(as_table([OK, ERROR]))
    text = console.export_text()
    assert "broken [bold]" in text and "-> do that" in text and "fine" in text


def test_json_has_what_a_script_needs() -> None:
    told = json.loads(as_json([OK, WARNING], Redactor({"VLLM_PLUGINS": "deltamem"}), strict=True))
    assert (told["deltamem"], told["worst"], told["passed"]) == (__version__, "warning", False)
    assert told["findings"][1] == {"check": "c", "level": "warning", "found": "slow", "mend": "do this"}
    assert told["environment"] == {"VLLM_PLUGINS": "deltamem"}


def test_a_bug_report_is_one_block() -> None:
    text = as_bug_report([OK, Finding("e", "error", "one\ntwo", "mend")], Redactor({}))
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")
    assert "error    e: one / two" in lines
    assert summary([OK, OK, ERROR]) == "1 error, 2 ok"


def test_secrets_and_homes_are_not_shown(tmp_path: Path) -> None:
    environment = {
        "VLLM_API_KEY": "sk-very-secret",
        "HF_TOKEN": "hf_abcdef",
        "DB_PASSWORD": "1",
        "PYTHONPATH": f"{tmp_path}/code",
        "EDITOR": "vi",
    }
    redactor = Redactor(environment, home=tmp_path)
    said = Finding("x", "note", f"{tmp_path}/a, sk-very-secret and http://user:pass@host/; 1 of hf_abcdef")
    (shown,) = redacted([said], redactor)
    assert shown.found == "~/a, *** and http://***@host/; 1 of ***"
    assert redactor.environment() == {"PYTHONPATH": "~/code"}
    assert redactor.text(f"{tmp_path}ed") == f"{tmp_path}ed", "another folder with the same start"
    report = as_bug_report([shown], redactor)
    assert not [secret for secret in ("sk-very", "hf_abc", "pass@", str(tmp_path)) if secret in report]


def test_no_variable_that_may_hold_a_secret_is_listed() -> None:
    assert not [name for name in SHOWN if any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))]
