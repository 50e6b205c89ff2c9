# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the predictor's parts are worth: calibrations with another target, without the values' reach, of fewer texts or
with fewer features.

One pass over the calibration's texts makes all of them, each a folder that a server can be given, and says how well
each predicts texts that it has not seen: the share of the target's variance that is explained, in all and within
heads; the rank correlation within heads; and the share of all worth that stays when a tenth of all entries is kept
by it. Lines with different targets do not compare: each is measured on its own. What they keep of a model's answers,
`deltamem eval ablation` measures afterwards. The line `hidden` has a hidden layer of 32 units beside the linear map; no
server can be given that.

    .venv/bin/python benchmarks/predictor_ablation.py [--model smollm2] [--out build/ablation] [--markdown FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hidden_layer import HiddenLayer
from report import Report
from torch import Tensor

from deltamem_vllm.calibration.artifact import Calibration, Card, save
from deltamem_vllm.calibration.attention import Recorder
from deltamem_vllm.calibration.corpus import draw, draw_held_out
from deltamem_vllm.calibration.fingerprint import fingerprint, geometry_of, read_config
from deltamem_vllm.calibration.metrics import held_out_metrics, mean_metrics, prediction_metrics
from deltamem_vllm.calibration.network import fetch, load_network, load_tokenizer
from deltamem_vllm.calibration.options import TARGETS, Options
from deltamem_vllm.calibration.predictor import PredictorFit, learn
from deltamem_vllm.calibration.profile import rank_profile
from deltamem_vllm.calibration.prompt import prompt_of
from deltamem_vllm.calibration.recipe import RECIPE, Recipe
from deltamem_vllm.calibration.targets import BOTH, observe
from deltamem_vllm.scoring.features import feature_widths

TEXTS = (1, 2, 4, 8)
HIDDEN = "hidden"
NO_REACH = "no-reach"
# What is learned from, by name: a target, and how what was observed counts.
SOURCES: dict[str, tuple[str, Recipe]] = {target: (target, RECIPE) for target in TARGETS}
SOURCES[NO_REACH] = (BOTH, Recipe(reach=False))
# Of `scoring.features`: the constant, the key, the lengths of its rotary pairs, the value, and four single numbers.
PARTS = {"keys": (1,), "pairs": (2,), "values": (3,), "norms": (4, 5, 6, 7)}
WITHOUT = {
    "no-keys": ("keys", "pairs"),
    "no-values": ("values",),
    "no-pairs": ("pairs",),
    "no-norms": ("norms",),
    "norms-only": ("keys", "pairs", "values"),
}


@dataclass(frozen=True)
class Variant:
    """One calibration: ``weights`` [layers, kv heads, features] and ``profile`` [layers, kv heads, quantiles], learned
    from ``source``, one of `SOURCES`."""

    name: str
    source: str
    weights: Tensor
    profile: Tensor


def main() -> None:
    args = parse()
    out = Report("Parts of the predictor", (__doc__ or "").split("\n\n")[1], args.markdown)
    folder = fetch(args.model)
    own, geometry = fingerprint(folder), geometry_of(read_config(folder))
    options = Options(samples=args.samples, tokens=args.tokens)
    tokenizer, recorder = load_tokenizer(folder), Recorder()
    recorder.register()
    network, prompt = load_network(folder), prompt_of(tokenizer)

    fits = {source: PredictorFit() for source in SOURCES}
    hidden = HiddenLayer()
    profiles: dict[str, list[Tensor]] = {source: [] for source in SOURCES}
    variants = []
    for count, sample in enumerate(draw(tokenizer, options.samples, options.tokens, options.kinds, options.seed), 1):
        seen = observe(network, tokenizer, recorder, prompt, sample)
        for source, fit in fits.items():
            entries = seen.entries(*SOURCES[source])
            learn(fit, entries)
            profiles[source].append(rank_profile(entries.worth))
        hidden.add(seen.entries(BOTH))
        if count in TEXTS:
            variants.append(variant(f"texts-{count}", BOTH, fits, profiles))
        print(f"text {count} of {options.samples}", flush=True)
    targets = [variant(f"target-{target}", target, fits, profiles) for target in TARGETS]
    variants = [*targets, variant(NO_REACH, NO_REACH, fits, profiles), *variants]
    whole = variants[list(TARGETS).index(BOTH)]
    dims = geometry.head_dim
    for name, parts in WITHOUT.items():
        weights = solve_without(fits[BOTH].sums(), geometry.layers, feature_widths(dims, dims), parts)
        variants.append(Variant(name, BOTH, weights, whole.profile))
    for one in variants:
        card = Card(args.model, own, geometry, {"made_by": "benchmarks/predictor_ablation.py", "variant": one.name})
        save(
            Calibration(card, {"rank_utility": one.profile, "predictor": one.weights}), args.out / one.name, force=True
        )

    hidden.fit(whole.weights)
    print("fitted the hidden layer", flush=True)

    found: dict[str, list[Mapping[str, Any]]] = {one.name: [] for one in variants} | {HIDDEN: []}
    for sample in draw_held_out(tokenizer, options.tokens, options.kinds, options.seed):
        seen = observe(network, tokenizer, recorder, prompt, sample)
        for one in variants:
            found[one.name].append(held_out_metrics(one.weights, one.profile, seen.entries(*SOURCES[one.source])))
        text = seen.entries(BOTH)
        found[HIDDEN].append(prediction_metrics(hidden.predict(text), whole.profile, text))
        print(f"held out: {sample.kind}", flush=True)
    out.add("| calibration | target | R2 | R2 within heads | Spearman | worth kept at 10% | oracle | random |")
    out.add("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, source in [(one.name, one.source) for one in variants] + [(HIDDEN, BOTH)]:
        mean, (target, _) = mean_metrics(found[name]), SOURCES[source]
        kept = mean["kept"]["0.1"]
        out.add(
            f"| {name} | {target} | {mean['r2']:.3f} | {mean['r2_within_heads']:.3f} | {mean['spearman']:.3f} "
            f"| {kept['predictor']:.3f} | {kept['oracle']:.3f} | {kept['random']:.3f} |"
        )
    out.close()


def variant(name: str, source: str, fits: Mapping[str, PredictorFit], profiles: Mapping[str, list[Tensor]]) -> Variant:
    """What was learned so far."""
    return Variant(name, source, fits[source].solve(), torch.stack(profiles[source]).mean(0))


def solve_without(sums: Mapping[str, Tensor], layers: int, widths: tuple[int, ...], parts: tuple[str, ...]) -> Tensor:
    """Weights [layers, kv heads, features] of the fit without some parts: 0 there, as a server takes them."""
    gone = {place for part in parts for place in PARTS[part]}
    kept = torch.cat([torch.full((width,), place not in gone) for place, width in enumerate(widths)])
    fit = PredictorFit()
    fit.restore(dict(_reduced(sums, layers, kept)))
    weights = torch.zeros(layers, sums["moments.0"].shape[0], len(kept))
    weights[..., kept] = fit.solve()
    return weights


def _reduced(sums: Mapping[str, Tensor], layers: int, kept: Tensor) -> Iterator[tuple[str, Tensor]]:
    for layer in range(layers):
        yield f"products.{layer}", sums[f"products.{layer}"][:, kept][:, :, kept]
        yield f"moments.{layer}", sums[f"moments.{layer}"][:, kept]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="an embedded model's name, a folder or a Hugging Face id")
    parser.add_argument("--out", type=Path, default=Path("build/ablation"), help="gets a folder for each calibration")
    parser.add_argument("--samples", type=int, default=Options.samples, help="texts to learn from")
    parser.add_argument("--tokens", type=int, default=Options.tokens, help="of each text")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to a file, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
