# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Numbers rounded as a cold page rounds them, for any number of bits and either way round: what a codec loses.

Nothing is packed here, so that codings which no page has can be measured by the same rules. For those that cold pages
do have, the result is that of `cold_codec`, bit by bit; a test compares the two.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

Along = Literal["channel", "token"]
"""What has a scale and a zero of its own."""

_LARGEST: Final = torch.finfo(torch.float16).max


def scale_and_zero(tokens: Tensor, there: Tensor, along: Along, bits: int) -> tuple[Tensor, Tensor]:
    """The float16 scale and zero that cover the range of pages of tokens.

    Parameters
    ----------
    tokens : Tensor
        ``[p, C, D]`` float32.
    there : Tensor
        ``[p, C]`` bool: which tokens count.
    along : str
        "channel": one for each of the D of a page; "token": one for each of the C.
    bits : int
        Of a code.

    Returns
    -------
    tuple of Tensor
        float32, ``[p, 1, D]`` or ``[p, C, 1]``: values that float16 has.
    """
    counts, over = there.unsqueeze(2), 1 if along == "channel" else 2
    low = tokens.masked_fill(~counts, torch.inf).amin(over, keepdim=True)
    high = tokens.masked_fill(~counts, -torch.inf).amax(over, keepdim=True)
    any_token = low <= high
    zero = torch.where(any_token, low, 0.0).clamp(-_LARGEST, _LARGEST).half().float()
    reach = torch.where(any_token, high - zero, 0.0).clamp(min=0.0)
    return (reach / (2**bits - 1)).clamp(max=_LARGEST).half().float(), zero


def to_codes(tokens: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes of tokens, float32 whole numbers from 0 to 2**bits - 1; 0 where the scale is."""
    coded = ((tokens - zero) / torch.where(scale > 0, scale, 1.0)).round_().clamp_(0, 2**bits - 1)
    return torch.where(scale > 0, coded, 0.0)


def rounded(
    tokens: Tensor, there: Tensor, along: Along, bits: int, random_codes: torch.Generator | None = None
) -> Tensor:
    """What decodes from pages of tokens that were coded: ``[p, C, D]`` float32, 0 where no token is.

    Parameters
    ----------
    tokens, there, along, bits
        As in `scale_and_zero`.
    random_codes : Generator or None
        Draw the codes instead of choosing them: a control that keeps the ranges and nothing else.
    """
    scale, zero = scale_and_zero(tokens, there, along, bits)
    if random_codes is None:
        codes = to_codes(tokens, scale, zero, bits)
    else:
        codes = torch.randint(0, 2**bits, tokens.shape, generator=random_codes).to(tokens)
    return (zero + codes * scale).masked_fill(~there.unsqueeze(2), 0.0)
