# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Gives Triton a driver without a device, so that model runner V2's kernels run in Triton's interpreter.

Python imports this file at start of every process that has its folder on PYTHONPATH; it acts only where
DELTAMEM_TEST_TRITON_ON_CPU is set. Slow, and only for tests.
"""

import os

if os.environ.get("DELTAMEM_TEST_TRITON_ON_CPU"):
    os.environ["TRITON_INTERPRET"] = "1"

    from types import SimpleNamespace

    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    class HostDriver:
        """The questions vLLM and Triton's runtime ask a driver, answered for the host."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: object = None) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_device_interface(self) -> object:
            import torch

            return torch.cpu

    backends["cpu"] = SimpleNamespace(compiler=None, driver=HostDriver)
