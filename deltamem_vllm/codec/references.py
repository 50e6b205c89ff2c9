# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Codecs inside a page that code a difference instead of the token: from the page's mean, from the token before.

Both are self-contained: what the differences start from is in the page, in float16.
"""

from __future__ import annotations

from torch import Tensor

from deltamem_vllm.codec.rounding import Along, rounded, scale_and_zero, to_codes


def from_page_mean(tokens: Tensor, there: Tensor, along: Along, bits: int) -> Tensor:
    """What decodes from differences to the page's mean token.

    Parameters
    ----------
    tokens : Tensor
        ``[p, C, D]`` float32.
    there : Tensor
        ``[p, C]`` bool: which tokens count; the first of a page does.
    along : str
        What has a scale of its own. With "channel" the range moves with the mean, and nothing is gained.
    bits : int
        Of a code.

    Returns
    -------
    Tensor
        ``[p, C, D]`` float32, 0 where no token is.
    """
    counts = there.unsqueeze(2)
    mean = tokens.masked_fill(~counts, 0.0).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    base = mean.half().float()
    return (base + rounded(tokens - base, there, along, bits)).masked_fill(~counts, 0.0)


def from_previous_token(tokens: Tensor, there: Tensor, along: Along, bits: int) -> Tensor:
    """What decodes from differences to the token before, as it decodes (closed loop); the first is kept in float16.

    Parameters and result are those of `from_page_mean`. With "token", each difference has its own scale. With
    "channel", scales come from the differences between the tokens themselves: those of the closed loop are not known
    before they are coded. A difference that falls outside is cut, and the next one has the rest in it.
    """
    current = tokens[:, :1].half().float()
    out = tokens.new_zeros(tokens.shape)
    out[:, :1] = current
    if along == "channel":
        steps = tokens[:, 1:] - tokens[:, :-1]
        scale, zero = scale_and_zero(steps, there[:, 1:], along, bits)
    for at in range(1, tokens.shape[1]):
        step = tokens[:, at : at + 1] - current
        if along == "token":
            scale, zero = scale_and_zero(step, there[:, at : at + 1], along, bits)
        current = current + zero + to_codes(step, scale, zero, bits) * scale
        out[:, at : at + 1] = current
    return out.masked_fill(~there.unsqueeze(2), 0.0)
