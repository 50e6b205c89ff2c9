# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Fixtures of all tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """Local path of the embedded SmolLM2 checkpoint; converted once per machine, then cached."""
    from deltamem_vllm.models.catalog import resolve_model

    return resolve_model("smollm2")
