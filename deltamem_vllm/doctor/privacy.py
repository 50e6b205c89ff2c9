# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Nothing that is printed gives a secret away: reports are pasted into public trackers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

SHOWN: Final = (
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "DELTAMEM_CACHE",
    "DELTAMEM_ISA",
    "DELTAMEM_NATIVE_LIBRARY",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "PROMETHEUS_MULTIPROC_DIR",
    "PYTHONPATH",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_INTERPRET",
    "VLLM_CACHE_ROOT",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_PLUGINS",
    "VLLM_PORT",
    "VLLM_TARGET_DEVICE",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_WORKER_MULTIPROC_METHOD",
)
"""The only environment variables that a report has."""

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_LEAST_SECRET = 6  # shorter values, such as "1" or "true", stand in every text


class Redactor:
    """Shortens home folders and hides secrets.

    Parameters
    ----------
    environment
        Whose secrets must not appear: values of variables that are called so.
    home
        Written as ``~``.
    """

    def __init__(self, environment: Mapping[str, str], home: Path | None = None) -> None:
        named = {value for name, value in environment.items() if _SECRET_NAME.search(name) and name not in SHOWN}
        # The longest first: one may be part of another.
        self._secrets = sorted((value for value in named if len(value) >= _LEAST_SECRET), key=len, reverse=True)
        self._home = str(home or Path.home()).rstrip("/")
        self._environment = environment

    def text(self, text: str) -> str:
        """The text as it may be shown."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        text = _USER_IN_URL.sub("***@", text)
        # A home of "/" is no home; "/root" must not turn "/rooted" into "~ed".
        return re.sub(rf"{re.escape(self._home)}(?=[/\s:,;)'\"]|$)", "~", text) if self._home else text

    def environment(self) -> dict[str, str]:
        """The variables of `SHOWN` that are set."""
        return {name: self.text(self._environment[name]) for name in SHOWN if name in self._environment}
