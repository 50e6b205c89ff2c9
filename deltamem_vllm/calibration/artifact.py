# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A calibration on disk: a folder with `calibration.safetensors` and `card.json`, whole or not there at all.

The card is for people and for servers: where the calibration comes from, which model it belongs to, and the
tensors' checksum. A reader ignores tensors and card entries it does not know, so a later version may add some
without a new format version; a change of meaning needs one.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_vllm.calibration.checks import AGAIN, check_tensors, without_other_features
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import Geometry, fingerprint, model_folder
from deltamem_vllm.models.store import cache_root, sha256_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
TENSORS = "calibration.safetensors"
CARD = "card.json"
SHIPPED = Path(__file__).parent / "shipped"


@dataclass(frozen=True)
class Card:
    """What a server needs to know of a calibration, and what people want to.

    Attributes
    ----------
    model : str
        As it was named; only for people.
    fingerprint : str
        Of the model, see `fingerprint.fingerprint`.
    geometry : Geometry
        Of the whole model.
    details : dict
        Everything else, JSON values: how it was made, the share table, metrics.
    """

    model: str
    fingerprint: str
    geometry: Geometry
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """A checked calibration.

    Attributes
    ----------
    card : Card
        Where it comes from.
    tensors : dict of Tensor
        By name, float32 on the CPU. `rank_utility` is always there, `predictor` unless it was made by a version of
        deltamem that knew none, or one with other features.
    folder : Path or None
        Where it was loaded from.
    """

    card: Card
    tensors: Mapping[str, Tensor]
    folder: Path | None = None

    @property
    def rank_utility(self) -> Tensor:
        """[layers, kv heads, quantiles] float32, non-negative, non-increasing: an entry's utility by its rank."""
        return self.tensors["rank_utility"]

    @property
    def predictor(self) -> Tensor | None:
        """[layers, kv heads, features] float32: weights of the scorer `predictor`, in the order of its features."""
        return self.tensors.get("predictor")


def save(made: Calibration, folder: Path, force: bool = False) -> None:
    """Write a calibration, all of it or nothing.

    Parameters
    ----------
    made : Calibration
        Checked before anything is written.
    folder : Path
        New, empty, or (with `force`) one that holds a calibration, which is replaced.
    force : bool
        Whether to replace one.
    """
    from safetensors.torch import save as to_bytes

    check_tensors(made.tensors, made.card.geometry, "the calibration")
    check_place(folder, force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new = scratch / "new"
        new.mkdir()
        tensors = {name: tensor.contiguous() for name, tensor in made.tensors.items()}
        # Not safetensors' own file writing, which lets nobody but the owner read: servers may run as another user.
        content = to_bytes(tensors, metadata={"format": "pt", "deltamem": str(FORMAT_VERSION)})
        (new / TENSORS).write_bytes(content)
        (new / CARD).write_text(_card_text(made.card, sha256_of(new / TENSORS)), encoding="utf-8")
        if folder.exists():
            # A folder cannot be renamed over one with files in it.
            folder.rename(scratch / "old")
        new.rename(folder)
    finally:
        shutil.rmtree(scratch)


def check_place(folder: Path, force: bool) -> None:
    """Raise `CalibrationError` if `save` would not write to `folder`; calibrating takes too long to ask afterwards."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is a file; give a folder to write {TENSORS} and {CARD} to")
    names = {path.name for path in folder.iterdir()}
    if names - {TENSORS, CARD}:
        others = ", ".join(sorted(names - {TENSORS, CARD})[:3])
        raise CalibrationError(f"{folder} holds other files ({others}); give a new folder, such as {folder}/deltamem")
    if names and not force:
        raise CalibrationError(f"{folder} holds a calibration already; --force replaces it, --out writes elsewhere")


def load(folder: Path) -> Calibration:
    """Read and check a calibration; raise `CalibrationError` with what is wrong and how to go on."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    raw = _read_card(folder)
    card = _card_of(raw, folder)
    path = folder / TENSORS
    if not path.is_file():
        raise CalibrationError(f"{path} is missing; {AGAIN}")
    found, stated = sha256_of(path), raw.get("tensors_sha256")
    if found != stated:
        raise CalibrationError(f"{path} has sha256 {found}, its card says {stated}: one of the two changed; {AGAIN}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CalibrationError(f"{path} cannot be read: {error}; {AGAIN}") from error
    tensors = without_other_features(tensors, card.geometry, str(path))
    check_tensors(tensors, card.geometry, str(path))
    return Calibration(card, tensors, folder)


def find(
    calibration: str, model: str | Path, *, revision: str | None = None, download_dir: str | None = None
) -> Calibration | None:
    """The calibration a server of `model` uses.

    Parameters
    ----------
    calibration : str
        "none"; the folder of one; or "auto": the first that belongs to the model of `places`.
    model : str or Path
        A local folder, or a Hugging Face id, which is looked up in the local cache and never downloaded.
    revision, download_dir : str or None
        Of a Hugging Face id; its default branch and the default cache if not given.

    Returns
    -------
    Calibration or None
        None for "none", and for "auto" if there is none. The reason is logged.

    Raises
    ------
    CalibrationError
        A named one is damaged or belongs to another model; or the first found with "auto" is damaged.
    """
    if calibration == "none":
        return None
    folder = model_folder(model, revision, download_dir)
    if calibration != "auto":
        return _named(Path(calibration).expanduser(), model, folder)
    if folder is None:
        logger.info("no calibration: %s has no folder with a config.json on this machine", model)
        return None
    try:
        own = fingerprint(folder)
    except CalibrationError as error:
        logger.info("no calibration: %s", error)
        return None
    for place in places(folder, own):
        if _card_of(_read_card(place), place).fingerprint == own:
            return load(place)
    logger.info("no calibration for %s (fingerprint %s); make one: deltamem calibrate %s", model, own, model)
    return None


def places(folder: Path, own: str) -> list[Path]:
    """Folders that "auto" looks at and that hold a calibration, in order, for a model's folder and fingerprint.

    The model's own subfolder `deltamem`, the user's cache, and those that deltamem ships.
    """
    order = [folder / "deltamem", cached_place(own), *sorted(SHIPPED.iterdir())]
    return [place for place in order if (place / CARD).is_file()]


def cached_place(own: str) -> Path:
    """Where `deltamem calibrate` writes unless told otherwise, for a model's fingerprint."""
    return cache_root() / "calibrations" / own


def _named(place: Path, model: str | Path, folder: Path | None) -> Calibration:
    chosen = load(place)
    if folder is None:
        raise CalibrationError(
            f"calibration={place}: cannot be compared with {model}, which has no folder with a config.json on this "
            'machine; use calibration="none", or download the model first'
        )
    own = fingerprint(folder)
    if own != chosen.card.fingerprint:
        raise CalibrationError(
            f"calibration={place} was made for {chosen.card.model} (fingerprint {chosen.card.fingerprint}), but "
            f"{model} has fingerprint {own}; {AGAIN} {model}"
        )
    return chosen


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CalibrationError(f"{folder} has no {CARD}; name a folder that `deltamem calibrate` wrote") from error
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}; {AGAIN}") from error
    if not isinstance(card, dict):
        raise CalibrationError(f"{path} is not a JSON object; {AGAIN}")
    if card.get("format_version") != FORMAT_VERSION:
        raise CalibrationError(
            f"{path} has format_version {card.get('format_version')}, this deltamem reads {FORMAT_VERSION}; {AGAIN}"
        )
    return card


def _card_of(raw: Mapping[str, Any], folder: Path) -> Card:
    rest = dict(raw)
    del rest["format_version"]
    rest.pop("tensors_sha256", None)
    try:
        model, own, sizes = rest.pop("model"), rest.pop("fingerprint"), rest.pop("geometry")
        return Card(str(model), str(own), Geometry(**{name: int(size) for name, size in sizes.items()}), rest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(f"{folder / CARD} states no usable model, fingerprint or geometry; {AGAIN}") from error


def _card_text(card: Card, checksum: str) -> str:
    content = {
        "format_version": FORMAT_VERSION,
        "model": card.model,
        "fingerprint": card.fingerprint,
        "geometry": asdict(card.geometry),
        **card.details,
        "tensors_sha256": checksum,
    }
    text = json.dumps(content, indent=1)
    # A list of numbers on one line: the table of shares is to be read.
    return re.sub(r"\[[\d\s.,e+-]+\]", lambda found: " ".join(found[0].split()), text) + "\n"
