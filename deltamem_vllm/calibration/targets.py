# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What an entry is worth: the most attention it gets while its text is repeated, or used, or the mean of both, times
how far its value reaches.

Repetition needs every token of a text once, use needs few of them and needs those badly. Their geometric mean rates
entries by both; docs/results/predictor.md has what each target was measured to keep, and what the reach is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deltamem_vllm.calibration.attention import Recorder
from deltamem_vllm.calibration.corpus import TokenSample
from deltamem_vllm.calibration.options import TARGETS
from deltamem_vllm.calibration.predictor import Entries
from deltamem_vllm.calibration.prompt import Prompt
from deltamem_vllm.calibration.reach import reach_of
from deltamem_vllm.calibration.reading import Reading
from deltamem_vllm.calibration.recipe import RECIPE, Recipe
from deltamem_vllm.calibration.repeat import longest_repetition, repeat
from deltamem_vllm.calibration.use import longest_use, use

REPEAT, ANSWERS, BOTH = TARGETS


@dataclass(frozen=True)
class Observed:
    """What a model did with a text.

    Attributes
    ----------
    keys, values : list of Tensor
        By layer, [kv heads, n, D] and [kv heads, n, D_v], on the model's device.
    watched : range
        Which of the n were watched: those of the text.
    peaks : dict of Tensor
        By target, [layers, kv heads, watched] float32 on the CPU: the largest share of a query's attention.
    reach : Tensor
        [layers, kv heads, watched] float32 on the CPU: how far each value reaches, see `reach.reach_of`.
    repeated : float or None
        Share of the repeated tokens that the model itself would have written; None if it did not repeat.
    answered : float or None
        The same of the answers' tokens; None if it was asked nothing.
    """

    keys: list[Tensor]
    values: list[Tensor]
    watched: range
    peaks: dict[str, Tensor]
    reach: Tensor
    repeated: float | None
    answered: float | None

    def entries(self, target: str, recipe: Recipe = RECIPE) -> Entries:
        """What there is to learn for a target that was observed."""
        peaks = self.peaks[target]
        return Entries(self.keys, self.values, peaks * self.reach if recipe.reach else peaks, self.watched)


def observe(
    model: Any, tokenizer: Any, recorder: Recorder, prompt: Prompt, sample: TokenSample, target: str = BOTH
) -> Observed:
    """Let a model read a sample, then repeat and use it, as far as the target needs it.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers that attends through `recorder`, and its tokenizer.
    recorder : Recorder
        Registered before the model was loaded.
    prompt : Prompt
        Of the tokenizer.
    sample : TokenSample
        Text and questions.
    target : str
        One of `TARGETS`; with "both" there are the peaks of all three.
    """
    reading = Reading(model, tokenizer, recorder, prompt, sample.tokens)
    peaks: dict[str, Tensor] = {}
    repeated = answered = None
    if target != ANSWERS:
        with reading.recorded() as found:
            repeated = repeat(reading)
        peaks[REPEAT] = found.peaks
    if target != REPEAT:
        with reading.recorded() as found:
            answered = use(reading, sample.questions)
        peaks[ANSWERS] = found.peaks
    if target == BOTH:
        peaks[BOTH] = geometric_mean(peaks[REPEAT], peaks[ANSWERS])
    reach = reach_of(recorder.modules, reading.values, reading.watched)
    return Observed(reading.keys, reading.values, reading.watched, peaks, reach, repeated, answered)


def geometric_mean(first: Tensor, second: Tensor, recipe: Recipe = RECIPE) -> Tensor:
    """The peaks whose target is the mean of the two peaks' targets: the scale's floor counts in both, and comes off."""
    floor = recipe.log_floor
    return ((first + floor) * (second + floor)).sqrt() - floor


def positions(tokenizer: Any, prompt: Prompt, samples: Sequence[TokenSample], target: str) -> int:
    """Positions that observing the samples takes at most, estimated from above."""
    most = 0
    for sample in samples:
        after = 0 if target == ANSWERS else longest_repetition(tokenizer, prompt, len(sample.tokens))
        if target != REPEAT:
            after = max(after, longest_use(tokenizer, prompt, sample.questions))
        most = max(most, len(prompt.before) + len(sample.tokens) + after)
    return most
