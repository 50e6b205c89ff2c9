# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The doctor's child that imports vLLM: what vLLM itself says of this installation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from deltamem_vllm.doctor.children import tell


def steps(request: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    """The facts, in the order in which they are found out."""
    return {
        "vllm": _vllm,
        "plugin": _plugin,
        "ledger": _ledger,
        "model": partial(_model, request["model"]),
    }


def _vllm() -> dict[str, Any]:
    import vllm
    from vllm.platforms import current_platform

    return {"version": vllm.__version__, "device": current_platform.device_type}


def _plugin() -> bool:
    """Whether vLLM's own loading of plugins brings our flags."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    from deltamem_vllm.integration.ledger import _APPLIED

    load_general_plugins()  # type: ignore[no-untyped-call]
    # Building vLLM's whole parser to look for the flag would take seconds.
    return getattr(EngineArgs.add_cli_args, _APPLIED, False)


def _ledger() -> dict[str, Any]:
    from vllm.platforms import current_platform

    from deltamem_vllm.integration.ledger import LedgerMismatch, verify_ledger
    from deltamem_vllm.integration.ledger_entries import LEDGER

    fault = None
    try:
        verify_ledger()
    except LedgerMismatch as error:
        fault = str(error)
    checked = [entry for entry in LEDGER if not entry.requires or current_platform.is_cuda_alike()]
    return {"names": len(checked), "fault": fault}


def _model(model: str | None) -> dict[str, Any] | None:
    """Whether the policy serves the model, by its config, with the defaults; None without a model."""
    if model is None:
        return None
    from vllm.engine.arg_utils import EngineArgs

    from deltamem_vllm.calibration.errors import CalibrationError
    from deltamem_vllm.calibration.fingerprint import model_folder
    from deltamem_vllm.config import CONFIG_KEY, ConfigError
    from deltamem_vllm.doctor.models import local_name
    from deltamem_vllm.integration.ledger import LedgerMismatch
    from deltamem_vllm.integration.refusals import UnsupportedFeatures
    from deltamem_vllm.plugin import register
    from deltamem_vllm.versions import UnsupportedVLLM

    name = local_name(model)
    if model_folder(name) is None:
        return {"is_here": False}
    # Also where VLLM_PLUGINS hides the plugin, which is a finding of its own.
    register()
    # The tokenizer decides nothing here, and a folder may have none.
    arguments = EngineArgs(model=name, additional_config={CONFIG_KEY: {}}, skip_tokenizer_init=True)
    try:
        vllm_config = arguments.create_engine_config()
    except UnsupportedFeatures as error:
        return {"is_here": True, "refused": str(error)}
    except (ConfigError, CalibrationError, LedgerMismatch, UnsupportedVLLM) as error:
        return {"is_here": True, "fault": str(error)}
    additional: Any = vllm_config.additional_config
    return {
        "is_here": True,
        "architecture": vllm_config.model_config.architecture,
        "config": {field: additional[CONFIG_KEY][field] for field in ("mode", "scorer", "dealing", "cold_bits")},
    }


if __name__ == "__main__":
    tell(steps)
