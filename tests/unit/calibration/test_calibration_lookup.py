# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Which calibration a server takes, and the one that is shipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deltamem_vllm.calibration import artifact
from deltamem_vllm.calibration.artifact import SHIPPED, TENSORS, find, load, save
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import fingerprint
from deltamem_vllm.calibration.profile import shares
from deltamem_vllm.calibration.recipe import RECIPE
from tests.support.calibration_models import made_for


def test_auto_takes_the_first_that_belongs_to_the_model(llama: Path, cache: Path) -> None:
    own = fingerprint(llama)
    assert find("auto", llama) is None
    cached, beside = cache / "calibrations" / own, llama / "deltamem"
    save(made_for(own), cached)
    found = find("auto", llama)
    assert found is not None and found.folder == cached
    # One that came along when the model was fine-tuned is passed over.
    save(made_for("of another"), beside)
    found = find("auto", llama)
    assert found is not None and found.folder == cached
    save(made_for(own), beside, force=True)
    found = find("auto", llama)
    assert found is not None and found.folder == beside
    assert find("none", llama) is None


def test_a_damaged_one_is_not_passed_over(llama: Path, cache: Path) -> None:
    own = fingerprint(llama)
    save(made_for(own), cache / "calibrations" / own)
    save(made_for(own), llama / "deltamem")
    (llama / "deltamem" / TENSORS).write_bytes(b"x")
    with pytest.raises(CalibrationError, match="one of the two changed"):
        find("auto", llama)


def test_a_named_one_must_belong_to_the_model(llama: Path, tmp_path: Path) -> None:
    own = fingerprint(llama)
    save(made_for(own), tmp_path / "right")
    found = find(str(tmp_path / "right"), llama)
    assert found is not None and found.card.fingerprint == own
    save(made_for("other"), tmp_path / "wrong")
    with pytest.raises(CalibrationError, match=rf"some/model \(fingerprint other\).*{own}; .*calibrate {llama}"):
        find(str(tmp_path / "wrong"), llama)
    with pytest.raises(CalibrationError, match="cannot be compared with org/missing"):
        find(str(tmp_path / "right"), "org/missing")
    with pytest.raises(CalibrationError, match=r"has no card\.json"):
        find(str(tmp_path / "nothing"), llama)


def test_finding_imports_neither_transformers_nor_vllm(llama: Path, tmp_path: Path) -> None:
    save(made_for(fingerprint(llama)), llama / "deltamem")
    code = (
        "import sys\n"
        "from deltamem_vllm.calibration.artifact import find\n"
        f"assert find('auto', {str(llama)!r}) is not None\n"
        "print(sorted({'transformers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_shipped_calibration_belongs_to_the_embedded_model(smollm2_path: str) -> None:
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 200_000
    place = SHIPPED / "smollm2-135m-instruct"
    shipped = load(place)
    assert shipped.card.fingerprint == fingerprint(Path(smollm2_path))
    assert shipped.rank_utility.shape == (30, 3, 128)
    assert place in artifact.places(Path(smollm2_path), shipped.card.fingerprint)
    # Made as calibrations are made now.
    assert shipped.card.details["recipe"] == RECIPE.identity()
    # Nothing in it is of the machine it was made on.
    assert "/" not in shipped.card.model
    assert shipped.card.details["metrics"]["repeat_accuracy"] > 0.8
    assert shipped.predictor is not None and shipped.predictor.shape == (30, 3, 165)
    held_out = shipped.card.details["metrics"]["predictor_held_out"]
    for kept in held_out["kept"].values():
        assert kept["predictor"] > 0.9 * kept["oracle"] > kept["random"]
    shares_of_quarter = torch.tensor(shipped.card.details["shares"]["0.25"]["heads"])
    torch.testing.assert_close(shares_of_quarter, shares(shipped.rank_utility, 0.25), atol=1e-3, rtol=0)
