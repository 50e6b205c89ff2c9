# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Memory as a server has it."""

from __future__ import annotations

import torch

from deltamem_vllm.ops.huge_pages import prefer_huge_pages


def as_in_a_server(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in huge pages where the kernel has some: a server asks for them for its KV pool."""
    memory = torch.zeros(tensor.shape, dtype=tensor.dtype)
    prefer_huge_pages(memory)
    return memory.copy_(tensor)
