# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Texts to calibrate with, for any tokenizer: natural and generated, from a seed, with questions about them.

`corpus_sample` makes one of any length, `draw` and `draw_held_out` those of a calibration, cut to tokens.
"""

from deltamem_vllm.calibration.corpus.draw import (
    FAMILIES,
    KINDS,
    TokenSample,
    corpus_sample,
    draw,
    draw_held_out,
    held_out_plan,
    plan,
    token_sample,
)
from deltamem_vllm.calibration.corpus.unit import Ask, Sample

__all__ = [
    "FAMILIES",
    "KINDS",
    "Ask",
    "Sample",
    "TokenSample",
    "corpus_sample",
    "draw",
    "draw_held_out",
    "held_out_plan",
    "plan",
    "token_sample",
]
