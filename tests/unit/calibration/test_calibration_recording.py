# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What is recorded while a model repeats and uses a text: the largest attention weights."""

from __future__ import annotations

import pytest
import torch

from deltamem_vllm.calibration.attention import Recorder, attend_and_peak
from deltamem_vllm.calibration.errors import CalibrationError


def test_peaks_are_the_maxima_of_whole_attention_weights() -> None:
    gen = torch.Generator().manual_seed(0)
    query = torch.randn(6, 37, 8, generator=gen)
    key, value = torch.randn(2, 90, 8, generator=gen), torch.randn(2, 90, 8, generator=gen)
    out, peak = attend_and_peak(query, key, value, 0.4, range(5, 60), piece_elements=6 * 90 * 10)
    expected = torch.zeros(2, 90)
    for head in range(6):
        for i in range(37):
            seen = 90 - 37 + i + 1
            weights = (key[head // 3, :seen] @ query[head, i] * 0.4).softmax(0)
            torch.testing.assert_close(out[head, i], weights @ value[head // 3, :seen])
            expected[head // 3, :seen] = torch.maximum(expected[head // 3, :seen], weights)
    torch.testing.assert_close(peak, expected[:, 5:60])
    torch.testing.assert_close(attend_and_peak(query, key, value, 0.4, range(5, 60)), (out, peak))


def test_attention_that_is_not_plain_is_refused() -> None:
    module = torch.nn.Module()
    q = torch.zeros(1, 2, 3, 4)
    for options in ({"softcap": 50.0}, {"sliding_window": 8}):
        with pytest.raises(CalibrationError, match=f"calls attention with {next(iter(options))}; supported: plain"):
            Recorder().attend(module, q, q, q, None, **options)
    with pytest.raises(CalibrationError, match="a mask or batch of its own"):
        Recorder().attend(module, q, q, q, torch.zeros(1))
    recorder = Recorder()
    recorder.start(range(3))
    with pytest.raises(CalibrationError, match=r"seen in layers \[\]"):
        recorder.finish()
