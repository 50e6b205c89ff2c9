# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A calibration under way: what was learned so far, on disk, so that an interrupted one goes on where it was.

One file, replaced as a whole after each text: the sums of the fit, the profiles, and in its header what it is of and
what came out so far.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.errors import CalibrationError

_FILE = "state.safetensors"
_PROFILES = "profiles"
_DECIDE_CORPUS = {"samples", "tokens", "kinds", "seed", "fingerprint"}


@dataclass
class Progress:
    """What was learned so far.

    Attributes
    ----------
    sums : dict of Tensor
        Of `PredictorFit`.
    profiles : list of Tensor
        Of each text that was learned from, [layers, kv heads, quantiles] float32.
    learned, held_out : list of dict
        What each text gave, JSON values; in the order of the corpus.
    seconds : float
        Spent so far, by the clock.
    cpu_seconds : float
        The same of the processor.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    profiles: list[Tensor] = field(default_factory=list)
    learned: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class Unfinished:
    """The folder of a calibration under way, beside the one that it will become.

    Parameters
    ----------
    place : Path
        Of the calibration.
    """

    def __init__(self, place: Path) -> None:
        self.folder = place.parent / f"{place.name}.unfinished"

    def load(self, identity: Mapping[str, Any], restart: bool) -> Progress:
        """What an earlier run of the same calibration learned; nothing if there was none, or with `restart`.

        Raises
        ------
        CalibrationError
            There is one of another model, other options or other texts, or it cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        file = self.folder / _FILE
        if restart or not file.is_file():
            return Progress()
        begin_anew = f"--restart begins anew, or remove {self.folder}"
        try:
            with safe_open(file, "pt") as state:
                header = json.loads(state.metadata()["deltamem"])
                tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"{file}, of an interrupted calibration, cannot be read: {error}; {begin_anew}"
            ) from error
        before, now = header["identity"], json.loads(json.dumps(dict(identity)))
        others = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if others:
            if _DECIDE_CORPUS & set(others):
                # Other options give another corpus; only where none differs is that news.
                others = [name for name in others if name != "corpus"]
            told = ", ".join(f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in others)
            raise CalibrationError(
                f"{self.folder} holds an interrupted calibration, but {told}; to go on, give what it was begun "
                f"with; {begin_anew}"
            )
        profiles = list(tensors.pop(_PROFILES))
        return Progress(tensors, profiles, **header["progress"])

    def save(self, identity: Mapping[str, Any], progress: Progress) -> None:
        """Replace what is on disk, all of it or nothing."""
        from safetensors.torch import save

        header = {
            "identity": dict(identity),
            "progress": {
                "learned": progress.learned,
                "held_out": progress.held_out,
                "seconds": progress.seconds,
                "cpu_seconds": progress.cpu_seconds,
            },
        }
        tensors = {name: tensor.contiguous() for name, tensor in progress.sums.items()}
        content = save({**tensors, _PROFILES: torch.stack(progress.profiles)}, {"deltamem": json.dumps(header)})
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f"{_FILE}.new"
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / _FILE)

    def remove(self) -> None:
        """The calibration is done, or begins anew."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
