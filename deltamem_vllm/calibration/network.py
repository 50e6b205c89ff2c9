# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Finds and loads the model that is to be calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.models.full_attention import other_than_full_attention

_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Float32 is exact and fast on a CPU; a model whose weights would take more in it keeps its own dtype.
_FLOAT32_UP_TO_BYTES = 8 << 30


def fetch(model: str) -> Path:
    """The model's folder; downloads it from Hugging Face unless it is on this machine."""
    from huggingface_hub import snapshot_download

    from deltamem_vllm.models.catalog import CATALOG, resolve_model

    path = Path(resolve_model(model))
    if (path / "config.json").is_file():
        return path
    if path.exists() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CalibrationError(
            f"{model} is no folder with a config.json; give one, a Hugging Face id (org/name), or an embedded model: "
            + ", ".join(CATALOG)
        )
    try:
        # Some repositories hold the weights twice, the second time for their own inference code.
        return Path(snapshot_download(model, allow_patterns=_FILES, ignore_patterns=["consolidated*", "original/*"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(f"{model} cannot be downloaded: {reason} A folder with the model will do") from error


def refuse_unserved(folder: Path) -> None:
    """Raise for what a server with deltamem refuses too, as far as the configuration tells."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"transformers cannot read the configuration in {folder}: {error}") from error
    found = other_than_full_attention(config)
    if found:
        raise CalibrationError(
            f"{config.model_type} has {found}; deltamem serves, and calibrates, decoder-only text models with full "
            "attention in every layer"
        )


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(f"{folder} has no tokenizer that transformers can read: {error}") from error


def device() -> str:
    """Where `load_network` puts models; with a model's files it decides their dtype."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_network(folder: Path) -> Any:
    """The model, which attends through the recorder that was registered last."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from deltamem_vllm.calibration.attention import NAME

    options: dict[str, Any] = {"dtype": "auto", "attn_implementation": NAME}
    if device() == "cuda":
        options["device_map"] = "auto"
    elif 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= _FLOAT32_UP_TO_BYTES:
        options["dtype"] = torch.float32
    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CalibrationError(f"transformers cannot load {folder} for calibration: {error}") from error
