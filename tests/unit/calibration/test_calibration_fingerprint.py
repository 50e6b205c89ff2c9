# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which model a calibration belongs to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltamem_vllm.calibration.artifact import find, save
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import fingerprint, model_folder
from deltamem_vllm.calibration.run import calibrate
from tests.support.calibration_models import edit_config, made_for
from tests.support.tiny_models import LAYERS, VOCAB


def rewrite(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: change(name, t) for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def test_copies_in_other_dtypes_and_of_other_writers_agree(llama: Path) -> None:
    def tiny_values(name: str, tensor: Tensor) -> Tensor:
        # Weights of a published model: bfloat16, some of them below float16's normal range.
        return torch.where(torch.arange(tensor.shape[-1]) % 5 == 0, tensor * 1e-6, tensor).bfloat16()

    rewrite(llama, tiny_values)
    own = fingerprint(llama)
    for dtype in (torch.float32, torch.float16):
        copy = Path(shutil.copytree(llama, llama.parent / str(dtype)))
        rewrite(copy, lambda name, tensor, dtype=dtype: tensor.to(dtype))  # type: ignore[misc]
        edit_config(copy, dtype=str(dtype).removeprefix("torch."))
        assert fingerprint(copy) == own
    rope = json.loads((llama / "config.json").read_text())["rope_parameters"]
    edit_config(llama, rope_parameters="drop", rope_theta=int(rope["rope_theta"]), rope_scaling=None)
    assert fingerprint(llama) == own


def test_shards_change_nothing(llama: Path) -> None:
    own = fingerprint(llama)
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, llama / file)
    assert fingerprint(llama) == own
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint(llama) == own


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
@pytest.mark.parametrize("kind", ["q_proj", "k_proj", "v_proj"])
def test_other_weights_differ(llama: Path, layer: int, kind: str) -> None:
    own = fingerprint(llama)
    tuned = f"layers.{layer}.self_attn.{kind}.weight"
    rewrite(llama, lambda name, tensor: tensor * 1.01 if name.endswith(tuned) else tensor)
    assert fingerprint(llama) != own


@pytest.mark.parametrize("fields", [{"vocab_size": VOCAB + 1}, {"rope_parameters": {"rope_theta": 1e6}}])
def test_other_sizes_differ(llama: Path, fields: dict[str, Any]) -> None:
    own = fingerprint(llama)
    edit_config(llama, **fields)
    assert fingerprint(llama) != own


@pytest.mark.parametrize("name", ["model.layers.{}.self_attn.qkv_proj.weight", "transformer.h.{}.attn.c_attn.weight"])
def test_fused_projections_are_read(llama: Path, name: str) -> None:
    tensors = {name.format(i): torch.full((8, 8), float(i)) for i in range(12)}
    save_file(tensors, llama / "model.safetensors")
    own = fingerprint(llama)
    tensors[name.format(1)] += 1  # not the last: layer 1 must not be taken for 11
    save_file(tensors, llama / "model.safetensors")
    assert fingerprint(llama) == own
    tensors[name.format(LAYERS - 1)] += 1
    save_file(tensors, llama / "model.safetensors")
    assert fingerprint(llama) != own


def test_a_model_without_weights_cannot_be_recognised(llama: Path, tmp_path: Path) -> None:
    (llama / "model.safetensors").unlink()
    with pytest.raises(CalibrationError, match="no safetensors with the attention weights of layer 0"):
        calibrate(str(llama))
    assert find("auto", llama) is None
    save(made_for(), tmp_path / "made")
    with pytest.raises(CalibrationError, match="no safetensors"):
        find(str(tmp_path / "made"), llama)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "not a JSON object"), ("{", "cannot be read"), ("{}", "states no usable 'num_attention_heads'")],
)
def test_config_that_states_nothing(llama: Path, text: str, message: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        fingerprint(llama)


def test_an_id_is_looked_up_in_the_local_cache(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    hub = tmp_path / "hub" / "models--org--name"
    shutil.copytree(tiny("llama"), hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    assert model_folder("org/name", cache_dir=str(tmp_path / "hub")) == hub / "snapshots" / "abc"
    assert model_folder("org/name", "other", str(tmp_path / "hub")) is None
    assert model_folder("/no/such/folder") is None
    assert find("auto", "org/other") is None
