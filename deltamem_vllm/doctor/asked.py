# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What every check may look at: the command's options, the environment, and what the child processes tell."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from deltamem_vllm.doctor.children import Facts, start

TORCH_FACTS = "deltamem_vllm.doctor.torch_facts"
VLLM_FACTS = "deltamem_vllm.integration.doctor_facts"


@dataclass(frozen=True)
class Asked:
    """One run of the doctor.

    Parameters
    ----------
    model
        Name, path or Hugging Face id of a model to look at; None for none.
    url
        Root of a running server to look at; None for none.
    port
        That a server is to be started on.
    environment
        Variables that decide how a server started from here behaves.
    """

    model: str | None = None
    url: str | None = None
    port: int = 8000
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @cached_property
    def torch_facts(self) -> Facts:
        """What a process with torch and the native library sees. Starts it; reading waits for it."""
        return start(TORCH_FACTS, {"model": self.model}, self.environment)

    @cached_property
    def vllm_facts(self) -> Facts:
        """What a process with vLLM sees. Starts it; reading waits for it."""
        return start(VLLM_FACTS, {"model": self.model}, self.environment)

    def close(self) -> None:
        """End the children that run, if any does."""
        for name in ("torch_facts", "vllm_facts"):
            if name in self.__dict__:
                getattr(self, name).close()
