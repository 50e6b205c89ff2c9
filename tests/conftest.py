# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

EXACTNESS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--exactness-report",
        type=Path,
        metavar="FILE",
        help="write the figures of the exactness tests that ran as a Markdown table",
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, rows = session.config.getoption("--exactness-report"), session.config.stash.get(EXACTNESS, [])
    if path is not None and rows:
        from deltamem_vllm.evaluation.machine import describe_machine

        header = [
            "# Exactness",
            "",
            "Log-probs of every generated token against an independent float32 reference that masks the evicted tokens",
            "per layer and kv head, teacher-forced on the engine's own output. `control` is the same comparison",
            "without the mask, on tokens that had something evicted: it must be large, or the run proves nothing.",
            "The bound is 1e-4 on every token. `pages`: fewest and most that a (layer, kv head) was dealt.",
            "",
            f'Command: `make test-all ARGS="-k masked_reference --exactness-report {path}"`',
            f"on {describe_machine()['cpu']}, {describe_machine()['cores']} cores.",
            "",
            "| scenario | runner | model | tokens | max abs dlogprob | control | compactions | preemptions | pages |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        path.write_text("\n".join([*header, *sorted(rows)]) + "\n")


@pytest.fixture(scope="module", autouse=True)
def environment_is_left_as_found() -> Iterator[None]:
    """vLLM sets a dozen variables where an engine runs, LD_PRELOAD among them: no later command may inherit them."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """Local path of the embedded SmolLM2 checkpoint; converted once per machine, then cached."""
    from deltamem_vllm.models.catalog import resolve_model

    return resolve_model("smollm2")
