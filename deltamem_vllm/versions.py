# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which vLLM releases deltamem runs in: one constant, one check."""

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

SUPPORTED_VLLM = ">=0.32.0,<0.33"
"""PEP 440 range of vLLM versions whose internals the patch ledger describes."""


class UnsupportedVLLM(RuntimeError):
    """The installed vLLM is outside of `SUPPORTED_VLLM`."""


def check_vllm_version(version: str) -> None:
    """Raise `UnsupportedVLLM` unless `version` lies in `SUPPORTED_VLLM`.

    Parameters
    ----------
    version
        What ``vllm.__version__`` says, for example ``0.32.0`` or ``0.32.0+cpu``.
    """
    try:
        # Release candidates and local builds of a supported line have its internals.
        supported = SpecifierSet(SUPPORTED_VLLM).contains(Version(version), prereleases=True)
    except InvalidVersion:
        supported = False
    if not supported:
        raise UnsupportedVLLM(
            f"deltamem cannot run in vLLM {version}; supported: {SUPPORTED_VLLM}. "
            f"Install a supported release (pip install 'vllm{SUPPORTED_VLLM}'), a deltamem release made for "
            f"vLLM {version}, or start without --kv-cache-policy deltamem."
        )
