# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What every scorer shares: the view it reads, the interface it fills, and the choice of survivors.

The worker builds one :class:`ScoreView` per layer and request, asks a :class:`Scorer` for a score per
resident entry and hands the result to :func:`select_survivors`. A scorer never decides how many entries stay
(the scheduler does) and never protects any (selection does).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from deltamem_vllm.scoring.seen import Seen

# Larger than the ordered bits of +inf (0x7F800000): a protected entry beats every possible score.
_PROTECTED_RANK = 0x7FFFFFFF
_INDEX_BITS = 32


@dataclass(frozen=True)
class ScoreView:
    """What a scorer may read: one layer of one request.

    Parameters
    ----------
    keys
        ``[H_kv, n, D]``, model dtype, RoPE applied, resident order (oldest entry first).
    values
        ``[H_kv, n, D_v]``, model dtype, same order.
    queries
        ``[H_q, w, D]``, model dtype, RoPE applied, oldest first: query ``i`` belongs to resident entry
        ``n - w + i``; query head ``h`` reads kv head ``h // (H_q / H_kv)``. None for scorers that ask for
        none.
    scale
        Factor on ``q . k`` before the softmax, usually ``D ** -0.5``.
    layer
        Index of the layer in model order.
    seed
        Seed of the policy, for scorers that draw numbers.
    first_head
        Index of the first kv head, on this rank: heads that hold different numbers of entries are rated one by one.
    seen
        Over the entries of this view and all that these heads were rated before, for scorers whose scores last; None
        where the entries here are all there are to go by.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None
    scale: float
    layer: int = 0
    seed: int = 0
    first_head: int = 0
    seen: Seen | None = None

    def __post_init__(self) -> None:
        keys, values, queries = self.keys, self.values, self.queries
        if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2] or keys.shape[1] == 0:
            raise ValueError(
                f"keys and values must be [H_kv, n, D] with equal H_kv and n >= 1, "
                f"got {tuple(keys.shape)} and {tuple(values.shape)}"
            )
        if queries is None:
            return
        if queries.dim() != 3 or queries.shape[2] != keys.shape[2] or queries.shape[0] % keys.shape[0]:
            raise ValueError(
                f"queries must be [H_q, w, {keys.shape[2]}] with H_q a multiple of {keys.shape[0]} kv heads, "
                f"got {tuple(queries.shape)}"
            )
        if not 1 <= queries.shape[1] <= keys.shape[1]:
            raise ValueError(
                f"the window must hold 1 to {keys.shape[1]} queries (one per resident entry), got {queries.shape[1]}"
            )

    @property
    def num_kv_heads(self) -> int:
        """H_kv: kv heads of this layer on this rank."""
        return self.keys.shape[0]

    @property
    def num_resident(self) -> int:
        """n: resident entries per kv head."""
        return self.keys.shape[1]

    @cached_property
    def keys_f32(self) -> Tensor:
        """The keys as float32, converted once."""
        return self.keys.float()

    @cached_property
    def values_f32(self) -> Tensor:
        """The values as float32, converted once."""
        return self.values.float()

    def logits(self, last: int | None = None) -> Tensor:
        """``scale * q . k`` of the window queries, -inf where a query must not look.

        Parameters
        ----------
        last
            Only the newest ``last`` queries; all of them when None.

        Returns
        -------
        Tensor
            ``[H_kv, G, w, n]`` float32, freshly allocated. Query ``i`` sees entries up to its own,
            ``n - w + i``.
        """
        if self.queries is None:
            raise ValueError("this view carries no queries: the scorer must set needs_queries = True")
        queries = self.queries if last is None else self.queries[:, self.queries.shape[1] - last :]
        heads, n, dim = self.keys.shape
        w = queries.shape[1]
        grouped = queries.float().mul(self.scale).reshape(heads, -1, dim)
        logits = (grouped @ self.keys_f32.transpose(1, 2)).view(heads, -1, w, n)
        if w > 1:
            # Only the last w columns hold entries that some query must not see.
            logits[..., n - w :] += torch.full((w, w), float("-inf"), device=logits.device).triu_(1)
        return logits

    def attention(self, last: int | None = None) -> Tensor:
        """Softmax of :meth:`logits`: ``[H_kv, G, w, n]`` float32; exactly 0 where a query must not look."""
        return self.logits(last).softmax(-1)


class Scorer(ABC):
    """One way to say which cached tokens matter.

    Subclasses set ``name``, ``summary`` and ``source`` and implement :meth:`score`. They keep no state
    between calls but what :meth:`bind` gave them, draw nothing from global generators and never wait for the device.
    """

    name: ClassVar[str]
    """How users call it: the name of the entry point in the group ``deltamem.scorers``."""
    summary: ClassVar[str]
    """What it keeps, in one line."""
    source: ClassVar[str]
    """Paper and arXiv id, or where else the idea comes from."""
    needs_queries: ClassVar[bool] = False
    """Whether the worker must record the observation window for it."""
    newest: ClassVar[int | None] = None
    """How many of the newest queries it reads, so that no more need be remembered; None reads the whole window."""
    comparable: ClassVar[bool] = False
    """Whether scores estimate future utility in one unit for all heads and layers, so that they may be added up and
    compared across them. Dealing then shares pages out by them; otherwise they only rank tokens inside a head.

    Attention of the newest queries does not qualify, although it is a mass: heads that retrieve rest on the sink until
    something is to be retrieved, and would be left with nothing (measured: docs/results/eval)."""

    profiled: ClassVar[bool] = True
    """Whether the calibration's head profile has a say where these scores share pages out. False for references that
    are to be judged by themselves."""

    lasting: ClassVar[bool] = False
    """Whether an entry keeps the score it was given first: what comes after it does not change it, or is not to. Where
    pages are dealt, a compaction then rates only the entries since the last one (with queries, by the newest of that
    time), and `ScoreView.seen` tells of the others."""

    over_heads: ClassVar[bool] = False
    """Whether a head's score depends on the other heads of its view, which are then all heads of the layer that hold
    equally many entries."""

    learned: ClassVar[str | None] = None
    """Name of the calibration's tensor that it cannot do without. A server that has none refuses to start with it."""

    @classmethod
    def observed(cls, window: int) -> int:
        """Queries a layer that are remembered for it with an observation window of ``window``; 0 if it needs none."""
        return min(window, cls.newest or window) if cls.needs_queries else 0

    def bind(self, learned: Tensor) -> None:
        """Take the tensor ``learned`` of the model's calibration, once, before anything is rated.

        Parameters
        ----------
        learned
            ``[layers, kv heads of this rank, ...]`` on the device of the views to come.
        """
        raise ValueError(f"scorer {self.name!r} learns nothing from a calibration; set its `learned` and define bind()")

    @abstractmethod
    def score(self, view: ScoreView) -> Tensor:
        """Rate every resident entry of one layer.

        Parameters
        ----------
        view
            The layer. Must not be modified.

        Returns
        -------
        Tensor
            ``[H_kv, n]`` float32 on the view's device; higher = keep.
        """


def select_survivors(scores: Tensor, keep: int, sink: int, recent: int) -> Tensor:
    """Choose which entries each kv head keeps.

    The first ``sink`` and last ``recent`` entries always stay; the rest of ``keep`` goes to the highest
    scores. Of equal scores the newer entry stays, so the result is the same on every device. NaN ranks below
    every number. Runs without waiting for the device: no data-dependent shapes.

    Parameters
    ----------
    scores
        ``[H_kv, n]``, higher = keep.
    keep
        Entries to keep per head, ``sink + recent <= keep <= n``.
    sink, recent
        Protected entries at the start and at the end.

    Returns
    -------
    Tensor
        ``[H_kv, keep]`` int64, ascending and unique in every row.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must be [H_kv, n], got {tuple(scores.shape)}")
    heads, n = scores.shape
    if sink < 0 or recent < 0 or keep < 1:
        raise ValueError(f"keep must be >= 1, sink and recent >= 0, got {keep=}, {sink=}, {recent=}")
    if keep > n:
        raise ValueError(f"cannot keep {keep} of {n} resident entries; keep must be at most {n}")
    if keep < sink + recent:
        raise ValueError(
            f"cannot keep {keep} entries with {sink} sink and {recent} recent tokens protected; "
            f"keep at least {sink + recent} or protect fewer"
        )
    index = torch.arange(n, device=scores.device)
    if keep == n:
        return index.expand(heads, n).contiguous()
    # One integer per entry, (score, index), makes all entries distinct: top-k is then deterministic although
    # it is not stable. Adding 0.0 turns -0.0 into 0.0; flipping the magnitude bits of negatives orders the
    # bit patterns like the numbers.
    clean = torch.where(scores.isnan(), float("-inf"), scores.float()) + 0.0
    bits = clean.contiguous().view(torch.int32)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    rank[:, :sink] = _PROTECTED_RANK
    rank[:, n - recent :] = _PROTECTED_RANK
    chosen = ((rank << _INDEX_BITS) | index).topk(keep, dim=-1, sorted=False).indices
    return chosen.sort(dim=-1).values
