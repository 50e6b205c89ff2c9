# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The calibration of a model: whether there is one, where, and which scorer `auto` then means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.findings import Finding
from deltamem_vllm.doctor.models import how_to_get

NAME = "calibration"


def check_calibration(asked: Asked) -> Iterator[Finding]:
    """What `calibration: auto` finds for the model."""
    told = asked.torch_facts.get("calibration")
    if told is None:
        yield Finding(NAME, "note", "not checked: no model was named", "deltamem doctor --model MODEL")
        return
    if not told["model_is_here"]:
        yield Finding(
            NAME, "warning", f"not checked: {asked.model} is not on this machine", how_to_get(str(asked.model))
        )
        return
    make = f"deltamem calibrate {asked.model}"
    if told["fingerprint"] is None:
        yield Finding(NAME, "warning", f"the model cannot be recognised: {told['why']}", "serve such a checkpoint")
        return
    short = told["fingerprint"][:12]
    if told["fault"] is not None:
        yield Finding(NAME, "error", told["fault"], f"{make} --force")
    elif told["folder"] is None:
        yield Finding(
            NAME,
            "warning",
            f"none for {asked.model} (fingerprint {short}): scorer `auto` is `distinct`, which loses more answers",
            f"{make} (writes to {told['place']})",
        )
    elif not told["predictor"]:
        yield Finding(
            NAME,
            "warning",
            f"{told['folder']} has no predictor of this version: scorer `auto` is `tova`",
            f"{make} --force",
        )
    else:
        yield Finding(
            NAME,
            "ok",
            f"{_origin(told)} for fingerprint {short}: {told['folder']}; scorer `auto` is `predictor-tova`",
        )


def _origin(told: dict[str, str]) -> str:
    from deltamem_vllm.calibration.artifact import SHIPPED

    folder = Path(told["folder"])
    if folder.parent == SHIPPED:
        return "shipped with deltamem"
    return "made on this machine" if folder == Path(told["place"]) else "brought along by the model"
