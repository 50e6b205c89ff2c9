# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which model a calibration belongs to: its sizes and a sample of its weights, the same in every plain dtype.

A model published in 16 bits and its copies in float32, bfloat16 and float16 agree, whichever version of
transformers wrote their config.json; so do a float32 model and its bfloat16 copy. A fine-tuned model
differs, unless the tuning left the sampled projections alone.

Nothing here imports transformers or uses the network: servers do this at start.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_vllm.calibration.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = "deltamem-fingerprint-1"
# By what architectures call them: separate projections, else fused ones.
_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("Wqkv",),
    ("c_attn",),
)
# Rows read of each matrix, evenly spaced: a start-up must not wait for whole matrices of a large model.
_ROWS = 64


@dataclass(frozen=True)
class Geometry:
    """What a calibration's tensors are shaped by. All are counts of the whole model, not of one rank."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int


def model_folder(model: str | Path, revision: str | None = None, cache_dir: str | None = None) -> Path | None:
    """Folder of a model on this machine: a local one, or a Hugging Face id's in the local cache; else None."""
    if (Path(model) / "config.json").is_file():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(model), "config.json", revision=revision, cache_dir=cache_dir)
    except HFValidationError:
        return None  # not of the form of an id: a folder that is not there
    return Path(found).parent if isinstance(found, str) else None


def geometry_of(config: Mapping[str, Any]) -> Geometry:
    """Read the sizes from a parsed config.json; raise `CalibrationError` if one is missing."""
    try:
        heads = int(config["num_attention_heads"])
        return Geometry(
            layers=int(config["num_hidden_layers"]),
            query_heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"config.json states no usable {error}; supported: decoder-only text models with num_hidden_layers, "
            "num_attention_heads and hidden_size"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Parse a model folder's config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CalibrationError(f"{path} is not a JSON object")
    return config


def fingerprint(folder: Path) -> str:
    """Hash a model's sizes and a sample of its attention weights.

    Parameters
    ----------
    folder : Path
        With a config.json and the weights as safetensors.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    CalibrationError
        The configuration cannot be read, or there are no such weights.
    """
    config = read_config(folder)
    digest = hashlib.sha256(json.dumps([_VERSION, _identity(config)], sort_keys=True).encode())
    files = _tensor_files(folder)
    for layer in sorted({0, geometry_of(config).layers - 1}):
        for name in _projections(files, layer, folder):
            digest.update(_sample(files[name], name))
    return digest.hexdigest()


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    geometry = geometry_of(config)
    return {
        "architectures": config.get("architectures"),
        "layers": geometry.layers,
        "query_heads": geometry.query_heads,
        "kv_heads": geometry.kv_heads,
        "head_dim": geometry.head_dim,
        "hidden": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "rope": _rope(config),
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one form: transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = {"rope_type" if name == "type" else name: value for name, value in given.items()}
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "default":
        del rope["rope_type"]
    return {name: float(value) if isinstance(value, int) else value for name, value in rope.items()}


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, of all safetensors of the model."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _projections(files: Mapping[str, Path], layer: int, folder: Path) -> list[str]:
    """Names of the layer's query, key and value projections, in that order."""
    for kinds in _PROJECTIONS:
        names = [
            next((n for n in sorted(files) if re.search(rf"(^|\.){layer}\.[\w.]*\b{kind}\.weight$", n)), None)
            for kind in kinds
        ]
        if all(name is not None and files[name].is_file() for name in names):
            return [name for name in names if name is not None]
    raise CalibrationError(
        f"{folder} has no safetensors with the attention weights of layer {layer} (such as "
        f"layers.{layer}.self_attn.k_proj.weight), by which deltamem recognises a model; supported: unquantised "
        "checkpoints in safetensors format, on this machine"
    )


def _sample(file: Path, name: str) -> bytes:
    import torch
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        matrix = tensors.get_slice(name)
        rows = int(matrix.get_shape()[0])
        step = max(1, rows // _ROWS)
        sample: Tensor = torch.cat([matrix[row : row + 1] for row in range(0, rows, step)])
    # bfloat16 has the fewest digits of the three, float16 the smallest range: below 2**-14 it loses digits.
    rounded = sample.to(torch.bfloat16)
    rounded = torch.where(rounded.abs() < 2**-14, 0.0, rounded)
    return rounded.contiguous().view(torch.int16).numpy().tobytes()
