# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Make a calibration: find the model, let it read and use a corpus, and write down what it looked at."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_vllm import __version__
from deltamem_vllm.calibration.artifact import Calibration, Card, cached_place, check_place, save
from deltamem_vllm.calibration.corpus import TokenSample, draw, draw_held_out
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import Geometry, fingerprint, geometry_of, read_config
from deltamem_vllm.calibration.network import device, fetch, load_network, load_tokenizer, refuse_unserved
from deltamem_vllm.calibration.options import Options

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = 'generated, and deltamem\'s text for calibrations (Jane Austen, "Pride and Prejudice")'

Report = Callable[[str], None]


def calibrate(
    model: str,
    out: Path | None = None,
    options: Options | None = None,
    *,
    force: bool = False,
    restart: bool = False,
    report: Report = lambda line: None,
) -> Calibration:
    """Calibrate a model and store the result.

    What was learned is on disk after each text, in a folder beside the result that goes when the result is there; the
    same call goes on where an interrupted one was.

    Parameters
    ----------
    model : str
        An embedded model's name, a local folder, or a Hugging Face id (downloaded if need be).
    out : Path or None
        Folder to write; the user's cache, where servers look, if not given.
    options : Options or None
        What to learn from and what to learn; the defaults if not given.
    force : bool
        Replace a calibration that is there already.
    restart : bool
        Forget what an interrupted one has learned.
    report : Callable
        Receives a line per stage and text.

    Raises
    ------
    CalibrationError
        The model is none that deltamem serves or that can be recognised, or there is something in the way: another
        calibration, or an interrupted one with other options.
    """
    chosen = options or Options()
    folder = fetch(model)
    own, geometry = fingerprint(folder), geometry_of(read_config(folder))
    place = out or cached_place(own)
    check_place(place, force)
    refuse_unserved(folder)
    tensors, details = _measure(folder, own, geometry, chosen, place, restart, report)
    made = {"deltamem_version": __version__, "created": datetime.now(UTC).isoformat(timespec="seconds")}
    card = Card(Path(model).name if Path(model).exists() else model, own, geometry, {**made, **details})
    calibration = Calibration(card, tensors, place)
    save(calibration, place, force)
    _unfinished(place).remove()
    return calibration


def _measure(
    folder: Path, own: str, geometry: Geometry, options: Options, place: Path, restart: bool, report: Report
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The artifact's tensors, and the part of the card that tells how they came about."""
    from deltamem_vllm.calibration import summary
    from deltamem_vllm.calibration.attention import Recorder
    from deltamem_vllm.calibration.learning import Course
    from deltamem_vllm.calibration.prompt import prompt_of
    from deltamem_vllm.calibration.reading import CHUNK, SINKS
    from deltamem_vllm.calibration.recipe import RECIPE
    from deltamem_vllm.calibration.targets import observe, positions

    started, used = time.monotonic(), time.process_time()
    tokenizer = load_tokenizer(folder)
    prompt = prompt_of(tokenizer)
    samples = draw(tokenizer, options.samples, options.tokens, options.kinds, options.seed)
    held_out = draw_held_out(tokenizer, options.tokens, options.kinds, options.seed)
    needed = positions(tokenizer, prompt, [*samples, *held_out], options.target)
    recorder = Recorder()
    recorder.register()
    identity = {
        "fingerprint": own,
        "deltamem": __version__,
        **options.as_json(),
        "device": device(),
        "corpus": _digest([*samples, *held_out]),
        "recipe": RECIPE.identity(),
    }
    # Before the model is loaded: that takes long if it is large.
    unfinished = _unfinished(place)
    progress = unfinished.load(identity, restart)
    report(f"loading {folder.name}")
    network = load_network(folder)
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise CalibrationError(
            f"--tokens {options.tokens} needs {needed} positions (the text, a request, and a part of the text again or "
            f"an answer); the model has {limit}"
        )
    before = progress.seconds, progress.cpu_seconds
    course = Course(
        lambda sample: observe(network, tokenizer, recorder, prompt, sample, options.target),
        geometry,
        options.target,
        progress,
        lambda done: unfinished.save(identity, done),
        report,
    )
    learned = course.go(samples, held_out)
    profile = learned.profiles.mean(0)
    details = {
        # Of all runs that it took.
        "duration_s": round(before[0] + time.monotonic() - started, 1),
        "cpu_s": round(before[1] + time.process_time() - used, 1),
        "device": network.device.type,
        "dtype": str(network.dtype).removeprefix("torch."),
        "options": options.as_json(),
        "recipe": RECIPE.identity(),
        "source": SOURCE,
        "texts": progress.learned,
        "held_out_texts": [{name: x for name, x in text.items() if name != "metrics"} for text in progress.held_out],
        "pass": {"chat_template": prompt.chat, "tokens_before": len(prompt.before), "sinks": SINKS, "chunk": CHUNK},
        "shares": summary.share_table(profile),
        "metrics": summary.metrics(learned.profiles, progress.learned, progress.held_out),
    }
    return {"rank_utility": profile, "predictor": learned.weights}, details


def _unfinished(place: Path) -> Any:
    from deltamem_vllm.calibration.unfinished import Unfinished

    return Unfinished(place)


def _digest(samples: Sequence[TokenSample]) -> str:
    return hashlib.sha256(json.dumps([sample.sha256 for sample in samples]).encode()).hexdigest()
