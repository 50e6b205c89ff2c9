# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Make a calibration: find the model, let it repeat some natural texts, and write down what it looked at."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamem_vllm import __version__
from deltamem_vllm.calibration.artifact import Calibration, Card, cached_place, check_place, save
from deltamem_vllm.calibration.errors import CalibrationError
from deltamem_vllm.calibration.fingerprint import Geometry, fingerprint, geometry_of, read_config
from deltamem_vllm.models.full_attention import other_than_full_attention

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = 4
TOKENS = 2048
_SOURCE = 'the calibration part of deltamem\'s texts (Jane Austen, "Emma")'
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Float32 is exact and fast on a CPU; a model whose weights would take more in it keeps its own dtype.
_FLOAT32_UP_TO_BYTES = 8 << 30

Report = Callable[[str], None]


@dataclass(frozen=True)
class Excerpt:
    """Tokens of one text, and the sentence of the book it starts at."""

    tokens: list[int]
    sentence: int
    sha256: str


def calibrate(
    model: str,
    out: Path | None = None,
    *,
    texts: int = TEXTS,
    tokens: int = TOKENS,
    force: bool = False,
    report: Report = lambda line: None,
) -> Calibration:
    """Calibrate a model and store the result.

    Parameters
    ----------
    model : str
        An embedded model's name, a local folder, or a Hugging Face id (downloaded if need be).
    out : Path or None
        Folder to write; the user's cache, where servers look, if not given.
    texts, tokens : int
        Natural texts to average over, and the tokens of each.
    force : bool
        Replace a calibration that is there already.
    report : Callable
        Receives a line per stage.

    Raises
    ------
    CalibrationError
        The model is none that deltamem serves or that can be recognised, or there is something in the way.
    """
    started, used = time.monotonic(), time.process_time()
    if texts < 1 or tokens < 1:
        raise CalibrationError(f"got {texts} texts of {tokens} tokens; both must be at least 1")
    folder = _fetch(model)
    own, geometry = fingerprint(folder), geometry_of(read_config(folder))
    place = out or cached_place(own)
    check_place(place, force)
    _refuse_unserved(folder)
    tensors, details = _measure(folder, geometry, texts, tokens, report)
    made = {
        "deltamem_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": round(time.monotonic() - started, 1),
        "cpu_s": round(time.process_time() - used, 1),
    }
    card = Card(Path(model).name if Path(model).exists() else model, own, geometry, {**made, **details})
    calibration = Calibration(card, tensors, place)
    save(calibration, place, force)
    return calibration


def _fetch(model: str) -> Path:
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


def _refuse_unserved(folder: Path) -> None:
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


def _measure(
    folder: Path, geometry: Geometry, texts: int, tokens: int, report: Report
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The artifact's tensors, and the part of the card that tells how they came about."""
    import torch
    from transformers import AutoTokenizer

    from deltamem_vllm.calibration.attention import Recorder
    from deltamem_vllm.calibration.predictor import PredictorFit, held_out_metrics, learn
    from deltamem_vllm.calibration.profile import rank_profile
    from deltamem_vllm.calibration.repeat import CHUNK, SINKS, longest_pass, prompt_of, repeat_pass

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(f"{folder} has no tokenizer that transformers can read: {error}") from error
    prompt = prompt_of(tokenizer)
    recorder = Recorder()
    recorder.register()
    report(f"loading {folder.name}")
    network = _load(folder)
    needed, limit = longest_pass(tokenizer, prompt, tokens), getattr(network.config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise CalibrationError(
            f"--tokens {tokens} needs {needed} positions (the text, the request, and a part of the text again); "
            f"the model has {limit}"
        )
    excerpts = excerpts_of(tokenizer, texts, tokens)
    profiles: list[Tensor] = []
    accuracies = []
    fit = PredictorFit()
    held_out = {}
    for i, excerpt in enumerate(excerpts, 1):
        before = time.monotonic()
        done = repeat_pass(network, tokenizer, recorder, prompt, excerpt.tokens)
        if tuple(done.peaks.shape[:2]) != (geometry.layers, geometry.kv_heads):
            raise CalibrationError(
                f"attention was seen in {done.peaks.shape[0]} layers with {done.peaks.shape[1]} kv heads; config.json "
                f"states {geometry.layers} and {geometry.kv_heads}"
            )
        if 1 < i == len(excerpts):
            # The last text, before anything is learned from it.
            so_far = torch.stack(profiles).mean(0)
            held_out = {"predictor_held_out": held_out_metrics(fit.solve(), so_far, done.entries)}
        learn(fit, done.entries)
        profiles.append(rank_profile(done.peaks))
        accuracies.append(done.accuracy)
        report(f"text {i} of {texts}: {time.monotonic() - before:.1f} s, {done.accuracy:.0%} repeated")
    every = torch.stack(profiles)
    details = {
        "device": network.device.type,
        "dtype": str(network.dtype).removeprefix("torch."),
        "texts": [
            {"source": _SOURCE, "from_sentence": e.sentence, "tokens": len(e.tokens), "sha256": e.sha256}
            for e in excerpts
        ],
        "pass": {"chat_template": prompt.chat, "tokens_before": len(prompt.before), "sinks": SINKS, "chunk": CHUNK},
        **_shares_and_metrics(every, accuracies, held_out),
    }
    return {"rank_utility": every.mean(0), "predictor": fit.solve()}, details


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from deltamem_vllm.calibration.attention import NAME

    options: dict[str, Any] = {"dtype": "auto", "attn_implementation": NAME}
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    elif 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= _FLOAT32_UP_TO_BYTES:
        options["dtype"] = torch.float32
    transformers_logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CalibrationError(f"transformers cannot load {folder} for calibration: {error}") from error


def excerpts_of(tokenizer: Any, texts: int, tokens: int) -> list[Excerpt]:
    """`texts` excerpts of exactly `tokens` tokens, from places spread evenly over the book.

    The evaluation's book is another one: what is learned here has seen nothing of it.
    """
    from deltamem_vllm.evaluation.texts import sentences

    book = sentences("calibration")
    found = []
    for i in range(texts):
        start = i * len(book) // texts
        # After its end the book begins again.
        text, characters = "".join(book[start:] + book[:start]), 4 * tokens
        ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        while len(ids) < tokens:
            if characters > len(text):
                raise CalibrationError(f"--tokens {tokens}: the text has only {len(ids)} tokens")
            characters *= 2
            ids = tokenizer(text[:characters], add_special_tokens=False, verbose=False).input_ids
        ids = list(ids[:tokens])
        found.append(Excerpt(ids, start, hashlib.sha256(tokenizer.decode(ids).encode()).hexdigest()))
    return found


def _shares_and_metrics(profiles: Tensor, accuracies: list[float], held_out: dict[str, Any]) -> dict[str, Any]:
    """From [texts, layers, kv heads, quantiles]: who gets how much, and how far that can be trusted.

    `held_out` holds further metrics.
    """
    from deltamem_vllm.calibration.profile import KEEP_RATIOS, shares

    mean = profiles.mean(0)
    table = {}
    for ratio in KEEP_RATIOS:
        share = shares(mean, ratio)
        table[f"{ratio:g}"] = {
            "layers": [round(x, 3) for x in share.mean(-1).tolist()],
            "heads": [[round(x, 3) for x in row] for row in share.tolist()],
        }
    quarter = shares(mean, 0.25)
    alone = [(shares(profile, 0.25) - quarter).abs().mean().item() for profile in profiles]
    return {
        "shares": table,
        "metrics": {
            # Of the repeated tokens, those the model would have written itself: low means it did not look things up.
            "repeat_accuracy": round(sum(accuracies) / len(accuracies), 4),
            "pairs": quarter.numel(),
            "pairs_below_a_tenth_at_0.25": int((quarter < 0.1).sum()),
            "pairs_above_nine_tenths_at_0.25": int((quarter > 0.9).sum()),
            # How far a pair's share at 0.25 by one text alone is from the one by all, on average.
            "difference_between_texts_at_0.25": round(sum(alone) / len(alone), 4),
            **held_out,
        },
    }
