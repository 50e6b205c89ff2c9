# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What tests learn of a command that they ran."""

from __future__ import annotations

import sys

import pytest

from tests.support.commands import run_command


def test_a_command_that_ends_gives_what_it_printed() -> None:
    done = run_command([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")


def test_a_command_that_hangs_says_where() -> None:
    code = "import time\nprint('began', flush=True)\ndef stuck(): time.sleep(60)\nstuck()"
    with pytest.raises(AssertionError, match="(?s)had not ended after.*waits in.*began.*in stuck"):
        run_command([sys.executable, "-c", code], timeout=5)
