# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Native libraries that are missing, damaged, of another version or wrong: each in a child that may crash."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.native import check_native, check_openmp
from deltamem_vllm.doctor.children import FactMissing, start
from deltamem_vllm.doctor.findings import Finding
from deltamem_vllm.doctor.run import examine
from deltamem_vllm.ops import native
from tests.support.doctor import found, only

# Everything that Python calls, and nothing of it does anything.
IDLE = """
extern "C" {
int deltamem_abi() { return %d; }
int deltamem_isa() { return 0; }
int deltamem_isa_supported() { return 1; }
int deltamem_use_isa(int) { return 0; }
int deltamem_threads() { return 1; }
int deltamem_gather_tokens() { return 0; }
int deltamem_gather_pages() { return 0; }
int deltamem_encode_delta() { return 0; }
int deltamem_encode_from() { return 0; }
int deltamem_check_cold_places() { return 0; }
int deltamem_decode_delta() { return 0; }
int deltamem_paged_attention() { return 0; }
}
"""


def look(library: Path, **environment: str) -> list[Finding]:
    """What the check says of a library."""
    return examine(
        Asked(environment={**os.environ, "DELTAMEM_NATIVE_LIBRARY": str(library), **environment}), [check_native]
    )


def build(folder: Path, source: str) -> Path:
    path = folder / "_native.so"
    command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-x", "c++", "-o", path, "-"]
    subprocess.run(command, input=source.encode(), check=True)
    return path


@pytest.fixture
def vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting vLLM's child beside would only take time: these checks do not ask it."""
    monkeypatch.setattr("deltamem_vllm.doctor.run.is_installed", lambda: False)


pytestmark = pytest.mark.usefixtures("vllm_is_left_alone")


def test_the_installed_library_is_right() -> None:
    asked = Asked()
    (finding,) = list(check_native(asked))
    assert finding.level == "ok" and "self-test right: moving tokens, writing cold pages, attention" in finding.found
    (finding,) = found(check_openmp, asked)
    assert finding.level == "ok" and "one runtime" in finding.found


def test_a_missing_library(tmp_path: Path) -> None:
    finding = only(look(tmp_path / "none.so"), "warning")
    assert "none.so is missing" in finding.found and "make native" in finding.mend


def test_a_library_that_was_cut_off(tmp_path: Path) -> None:
    whole = native._path().read_bytes()
    (tmp_path / "cut.so").write_bytes(whole[: len(whole) // 3])
    (finding,) = look(tmp_path / "cut.so")
    assert finding.level == "error"
    assert "cut.so" in finding.found or "was killed by SIG" in finding.found


def test_a_library_whose_code_was_overwritten(tmp_path: Path) -> None:
    damaged = bytearray(native._path().read_bytes())
    sections = subprocess.run(
        ["readelf", "-SW", str(native._path())], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    (text,) = [line.split("]", 1)[1].split() for line in sections if " .text " in line]
    offset, size = int(text[3], 16), int(text[4], 16)
    damaged[offset : offset + size] = bytes(size)
    (tmp_path / "zeroed.so").write_bytes(damaged)
    (finding,) = look(tmp_path / "zeroed.so")
    assert finding.level == "error" and "was killed by SIG" in finding.found


def test_a_library_of_another_version(tmp_path: Path) -> None:
    (finding,) = look(build(tmp_path, IDLE % (native._ABI + 1)))
    assert finding.level == "error" and f"interface {native._ABI + 1}, needed {native._ABI}" in finding.found


def test_a_library_that_calculates_nothing(tmp_path: Path) -> None:
    findings = look(build(tmp_path, IDLE % native._ABI))
    wrong = [finding.found for finding in findings if finding.level == "error"]
    assert len(wrong) == 3 and all("self-test of" in one for one in wrong)
    assert not [finding for finding in findings if finding.level == "ok"]
    assert "less than the machine has" in only(findings, "note").found


def test_an_instruction_set_that_is_not_there() -> None:
    (finding,) = look(native._path(), DELTAMEM_ISA="avx1024")
    assert finding.level == "error" and "DELTAMEM_ISA is 'avx1024'" in finding.found


def test_two_openmp_runtimes(tmp_path: Path) -> None:
    second = tmp_path / "lib" / "libomp.so"
    second.parent.mkdir()
    build(second.parent, "").rename(second)
    finding = only(found(check_openmp, Asked(environment={**os.environ, "LD_PRELOAD": str(second)})), "warning")
    assert str(second) in finding.found and "LD_PRELOAD" in finding.mend


def test_a_child_that_is_too_slow_or_speaks_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import time\nprint('so tired')\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    facts = start("sleeper", {}, environment, timeout_s=3)
    with pytest.raises(FactMissing, match="did not end within 3 s; it said last: so tired"):
        facts.get("anything")
    facts.close()
