# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a model's heads are worth before a request is seen, and how that joins what the request shows."""

from __future__ import annotations

import torch
from torch import Tensor


class HeadPrior:
    """Expected utility of the pages of every pair (layer, kv head), from a calibration.

    Parameters
    ----------
    rank_utility: ``[L, H, Q]`` float: the utility that an entry of the pair is expected to have if a share
        ``(i + 0.5) / Q`` of the pair's entries have more. Finite, not negative, never increasing along Q. On the device
        on which pages are to be rated; of tensor-parallel ranks, each gives its own heads.

    Raises
    ------
    ValueError: not such a table.
    """

    def __init__(self, rank_utility: Tensor) -> None:
        if rank_utility.dim() != 3 or not rank_utility.is_floating_point() or 0 in rank_utility.shape:
            raise ValueError(
                "rank_utility must be a float [L, H, Q] without an empty dimension, "
                f"got {tuple(rank_utility.shape)} {rank_utility.dtype}"
            )
        table = rank_utility.double()
        if not bool(table.isfinite().all()) or bool((table < 0).any()):
            raise ValueError("rank_utility must be finite and not negative; calibrate the model again")
        # Means of descending numbers descend but for rounding.
        if bool((table.diff(dim=2) > 1e-6 * table[:, :, :1]).any()):
            raise ValueError(
                "rank_utility must not increase with the rank: sort each text's utilities in descending order "
                "before averaging"
            )
        self._ranks = table.shape[2]
        # Integral of the table, a step function of the quantile, from 0 to i / Q.
        self._integral = torch.nn.functional.pad(table.cumsum(2) / self._ranks, (1, 0))

    @property
    def num_pairs(self) -> tuple[int, int]:
        """Layers and kv heads."""
        return self._integral.shape[0], self._integral.shape[1]

    def pages(self, logical_len: int, block_size: int, count: int, lengths: Tensor | None = None) -> Tensor:
        """Utility of the pages that a pair's best tokens would fill, best page first.

        The table is stretched over the N tokens that the request has seen: page k holds ranks
        ``k * block_size .. (k + 1) * block_size - 1`` of N, and its utility is N times the integral over that quantile
        range. Tokens that are gone were the last in rank, so pages keep their worth after a compaction.

        Parameters
        ----------
        logical_len: tokens that the request has seen, N.
        block_size: tokens of a page.
        count: pages to rate, P.
        lengths: ``[L, H]`` int64, resident tokens of each pair; N where None.

        Returns
        -------
        ``[L, H, P]`` float32, never increasing along P; -inf for pages that the tokens do not fill.

        Raises
        ------
        ValueError: a number below 1, or lengths of another shape.
        """
        if min(logical_len, block_size, count) < 1:
            raise ValueError(
                f"logical_len, block_size and count must be at least 1, got {logical_len}, {block_size}, {count}"
            )
        if lengths is not None and (lengths.shape != self.num_pairs or lengths.dtype != torch.int64):
            raise ValueError(f"lengths must be int64 {self.num_pairs}, got {lengths.dtype} {tuple(lengths.shape)}")
        edges = torch.arange(count + 1, device=self._integral.device) * block_size
        place = (edges.double() * (self._ranks / logical_len)).clamp_(max=self._ranks)
        step = place.long().clamp_(max=self._ranks - 1)
        low, high = self._integral[:, :, step], self._integral[:, :, step + 1]
        worth = ((low + (high - low) * (place - step)) * logical_len).diff(dim=2).float()
        ends = logical_len if lengths is None else lengths.unsqueeze(2)
        return worth.clamp_(min=0.0).cummin(2).values.masked_fill(edges[1:] > ends, float("-inf"))


def combine(live: Tensor | None, prior: Tensor | None) -> Tensor:
    """Join what a request shows with what its model's heads are usually worth.

    The geometric mean of the two, each divided by its mean over the pages that exist: a page is worth much if both
    say so, and neither unit matters. Negative utilities count as 0. One that is 0 everywhere says nothing and
    is left out. Given only one of the two, that one is returned as it is.

    Parameters
    ----------
    live: ``[L, H, P]`` float, summed scores of comparable scorers; None for others.
    prior: ``[L, H, P]`` float of :meth:`HeadPrior.pages`; None without a calibration.

    Returns
    -------
    ``[L, H, P]``; -inf where either is.

    Raises
    ------
    ValueError: neither is given, or their shapes differ.
    """
    if live is None or prior is None:
        only = live if prior is None else prior
        if only is None:
            raise ValueError(
                "pages can be dealt by live utility, by a calibration's prior or by both; neither was given. Choose a "
                "comparable scorer, give a calibration, or set dealing to 'equal'"
            )
        return only
    if live.shape != prior.shape:
        raise ValueError(
            f"live and prior utility must have one shape, got {tuple(live.shape)} and {tuple(prior.shape)}"
        )
    gone = (live == float("-inf")) | (prior == float("-inf"))
    return (_relative(live, gone) * _relative(prior, gone)).sqrt().float().masked_fill(gone, float("-inf"))


def _relative(utility: Tensor, gone: Tensor) -> Tensor:
    """Utility in units of its mean over the pages that are not gone, float64; 1 everywhere if that mean is 0."""
    worth = utility.double().nan_to_num(nan=0.0).clamp_(min=0.0).masked_fill(gone, 0.0)
    mean = worth.sum() / (~gone).sum().clamp(min=1)
    return torch.where(mean > 0, worth / mean, 1.0)
