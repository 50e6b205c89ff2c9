# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""docs/reference/compatibility.md is what the versions, the refusals and their tests say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deltamem_vllm.versions import SUPPORTED_VLLM

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "scripts" / "compatibility.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compatibility"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script: ModuleType) -> None:
    assert script.PAGE.read_text() == script.render(), "run: python scripts/compatibility.py"


def test_the_page_has_every_refusal_with_its_test(script: ModuleType) -> None:
    page = script.render()
    tables = (*script.CONFIG_REFUSALS, *script.SPEC_REFUSALS, *script.RUNNER_REFUSALS)
    assert len(tables) > 30
    for row in tables:
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {row.name} |")]
        assert "`test_" in line
    assert SUPPORTED_VLLM in page


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ("tests/unit/test_refusals.py::test_nothing", "has no test_nothing"),
        ("tests/exactness/test_exactness.py::test_engine_equals_masked_reference[no-such]", "no scenario 'no-such'"),
        ("somewhere", "is no test"),
    ],
)
def test_a_test_that_does_not_exist_is_an_error(script: ModuleType, test: str, told: str) -> None:
    with pytest.raises(LookupError, match=told):
        script._reference(test)


def test_a_refusal_without_a_test_is_an_error(script: ModuleType) -> None:
    row = script.Refusal("new feature", lambda _: None, "nothing", "nothing")
    with pytest.raises(LookupError, match="'new feature' has no test"):
        script._refused(row, script._tests_by_string(ROOT / script.REFUSAL_TESTS))


def test_check_fails_on_an_older_page(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["compatibility.py", "--check"])
    assert script.main() == 1, "not there"
    script.PAGE.write_text(script.render() + "| more |")
    assert script.main() == 1
    assert "out of date; run: python scripts/compatibility.py" in capsys.readouterr().err
    script.PAGE.write_text(script.render())
    assert script.main() == 0
