# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Measure every scheme on a real model: read texts, code their cache, and see what the model makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from deltamem_vllm.calibration.fingerprint import Geometry, geometry_of, read_config
from deltamem_vllm.calibration.network import fetch, load_network, load_tokenizer, refuse_unserved
from deltamem_vllm.calibration.prompt import prompt_of
from deltamem_vllm.codec.layer_maps import fit_layer_maps
from deltamem_vllm.evaluation.codec.coding import Between, Cache, code, layer_coder, random_codes, to_rows
from deltamem_vllm.evaluation.codec.errors import CodecError
from deltamem_vllm.evaluation.codec.measure import attention_outputs, divergence, output_change, relative_error
from deltamem_vllm.evaluation.codec.reading import Read, Watcher, go_on, read
from deltamem_vllm.evaluation.codec.results import Controls, Measured, Row
from deltamem_vllm.evaluation.codec.rotation import check_rotation, rotation_of
from deltamem_vllm.evaluation.codec.schemes import SCHEMES, SERVED, Layout, layer_bits
from deltamem_vllm.evaluation.codec.settings import SINKS, Settings
from deltamem_vllm.evaluation.codec.texts import held_out, to_fit_on
from deltamem_vllm.evaluation.machine import describe_code, describe_machine

Report = Callable[[str], None]

_ROUNDING = 1e-9  # nats: two runs of the same arithmetic


@dataclass(frozen=True)
class _Text:
    """A text that is measured with, and what the whole cache gives."""

    read: Read
    following: list[int]
    log_probs: Tensor
    outputs: Tensor


def measure(model: str, settings: Settings, report: Report = lambda line: None) -> Measured:
    """Measure what coding the cache of a model loses.

    Parameters
    ----------
    model : str
        An embedded model's name, a local folder, or a Hugging Face id.
    settings : Settings
        Texts, bits, pages and references.
    report : Callable
        Receives a line per stage and row.

    Raises
    ------
    CodecError, CalibrationError
        The model is none that deltamem serves, or a setting does not fit it.
    """
    started = time.monotonic()
    folder = fetch(model)
    refuse_unserved(folder)
    geometry = geometry_of(read_config(folder))
    layouts = list(_layouts(settings, geometry))
    tokenizer = load_tokenizer(folder)
    prompt = prompt_of(tokenizer)
    texts, corpus = held_out(tokenizer, prompt, settings), to_fit_on(tokenizer, prompt, settings)
    watcher = Watcher()
    watcher.register()
    report(f"loading {folder.name}")
    network = load_network(folder)
    positions = max(len(tokens) + len(following) for tokens, following in texts)
    limit = getattr(network.config, "max_position_embeddings", None)
    if limit is not None and positions > limit:
        raise CodecError(
            f"--tokens {settings.tokens} needs {positions} positions (template, text and continuation); the model has "
            f"{limit}; give fewer"
        )
    ready = []
    for number, (tokens, following) in enumerate(texts, 1):
        report(f"reading text {number} of {len(texts)}")
        ready.append(_prepare(network, watcher, tokens, following))
    fit = _Fit(network, watcher, corpus, settings, geometry, ready[0].read, report)
    controls = _controls(network, ready, layouts[0])
    report(f"controls: exact {controls.exact:.2g}, random codes {controls.random:.2g} nats a token")
    rows, begun = [], time.monotonic()
    for done, layout in enumerate(layouts):
        rows.append(_row(network, ready, layout, fit))
        left = (time.monotonic() - begun) / (done + 1) * (len(layouts) - done - 1)
        report(f"{done + 1} of {len(layouts)}: {rows[-1].name}: KL {rows[-1].kl:.4f}; {left:.0f} s left")
    details = {
        "dtype": str(network.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "machine": describe_machine(),
        "code": describe_code(("codec/",)),
        "duration_s": round(time.monotonic() - started, 1),
    }
    return Measured(model if "/" not in model else folder.name, asdict(settings), geometry, controls, rows, details)


def _layouts(settings: Settings, geometry: Geometry) -> Iterator[Layout]:
    pairs = geometry.layers * geometry.kv_heads
    for page_tokens in settings.page_tokens:
        for scheme in SCHEMES:
            if scheme.reference in settings.references:
                for bits in settings.bits:
                    yield Layout(scheme, bits, geometry.head_dim, page_tokens, pairs)


def _prepare(network: Any, watcher: Watcher, tokens: list[int], following: list[int]) -> _Text:
    found = read(network, watcher, tokens)
    return _Text(
        found, following, go_on(network, found.cache, following), attention_outputs(found.queries, found.cache)
    )


def _controls(network: Any, texts: list[_Text], layout: Layout) -> Controls:
    """The cache uncoded, through everything else, must change nothing; drawn codes must change much."""
    served = replace(layout, scheme=SERVED)
    exact, drawn = [], []
    for seed, text in enumerate(texts):
        sinks, rest = text.read.cache.first(SINKS), text.read.cache.part(SINKS)
        exact.append(divergence(text.log_probs, go_on(network, rest.behind(sinks), text.following)))
        changed = random_codes(served, rest, seed).behind(sinks)
        drawn.append(divergence(text.log_probs, go_on(network, changed, text.following)))
    controls = Controls(fmean(exact), fmean(drawn))
    if abs(controls.exact) > _ROUNDING:
        raise CodecError(
            f"the cache that was not coded gives other words (KL {controls.exact:.2e} nats a token), so no figure here "
            "would mean anything: the model keeps something beside keys and values, or its arithmetic is not repeatable"
        )
    return controls


class _Fit:
    """Fits maps between layers when they are asked for; texts are read at the first time."""

    def __init__(
        self,
        network: Any,
        watcher: Watcher,
        corpus: list[list[int]],
        settings: Settings,
        geometry: Geometry,
        example: Read,
        report: Report,
    ) -> None:
        self._heads, self._report = geometry.kv_heads, report
        if "layer" not in settings.references:
            return
        longest = max(map(len, [*corpus, example.tokens]))
        self._rotation = rotation_of(network, longest)
        check_rotation(network, self._rotation, example.cache.keys[0], example.tokens)
        self._rows = []
        for number, tokens in enumerate(corpus, 1):
            report(f"reading text {number} of {len(corpus)} to fit maps between layers on")
            self._rows.append(self._rows_of(read(network, watcher, tokens).cache))

    def for_layout(self, layout: Layout) -> Between | None:
        """What this layout needs beside the cache."""
        if layout.scheme.reference != "layer":
            return None
        return Between(fit_layer_maps(self._rows, layer_coder(layout, self._heads)), self._rotation)

    def _rows_of(self, cache: Cache) -> Tensor:
        # Sinks are like no other token, and exact.
        return to_rows(cache.part(SINKS), self._rotation, SINKS)


def _row(network: Any, texts: list[_Text], layout: Layout, fit: _Fit) -> Row:
    between = fit.for_layout(layout)
    key_errors, value_errors, kls, coded_sinks = (list[float]() for _ in range(4))
    changes, key_changes, value_changes = (list[Tensor]() for _ in range(3))
    for text in texts:
        whole = text.read.cache
        sinks, rest = whole.first(SINKS), whole.part(SINKS)
        decoded = code(layout, rest, between, SINKS)
        key_errors.append(relative_error(rest.keys, decoded.keys))
        value_errors.append(relative_error(rest.values, decoded.values))
        changed = decoded.behind(sinks)
        for into, seen in (
            (changes, changed),
            (key_changes, Cache(changed.keys, whole.values)),
            (value_changes, Cache(whole.keys, changed.values)),
        ):
            into.append(output_change(text.outputs, attention_outputs(text.read.queries, seen)))
        kls.append(divergence(text.log_probs, go_on(network, changed, text.following)))
        all_coded = code(layout, whole, between)
        coded_sinks.append(divergence(text.log_probs, go_on(network, all_coded, text.following)))
    by_layer = torch.stack(changes).mean(0)
    key_bits, value_bits = _mean_bits(layout, len(by_layer))
    return Row(
        page_tokens=layout.page_tokens,
        reference=layout.scheme.reference,
        keys=layout.scheme.keys.along,
        values=layout.scheme.values.along,
        bits=layout.bits,
        written=layout.written,
        capacity=layout.capacity,
        key_bits=key_bits,
        value_bits=value_bits,
        key_error=fmean(key_errors),
        value_error=fmean(value_errors),
        loss=float(by_layer.mean()),
        loss_keys=float(torch.stack(key_changes).mean()),
        loss_values=float(torch.stack(value_changes).mean()),
        loss_by_layer=[float(change) for change in by_layer],
        kl=fmean(kls),
        kl_by_text=kls,
        kl_coded_sinks=fmean(coded_sinks),
    )


def _mean_bits(layout: Layout, layers: int) -> tuple[float, float]:
    """Bits of an element of keys and of values, mean over the layers."""
    own = [replace(layout, bits=layer_bits(layout.scheme.reference, layer, layout.bits)) for layer in range(layers)]
    return fmean(each.key_bits for each in own), fmean(each.value_bits for each in own)
