# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Slow, obvious definitions of the scores: one entry at a time, in float64.

Tests compare every scorer with these; nothing else calls them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltamem_vllm.scoring.base import ScoreView


def weights_of(view: ScoreView, query_head: int, i: int) -> list[float]:
    """Softmax weights of window query ``i`` of one query head over all n entries; 0 where it cannot see."""
    assert view.queries is not None, "only scorers with queries ask for weights"
    group = view.queries.shape[0] // view.num_kv_heads
    keys = view.keys[query_head // group].double()
    visible = view.num_resident - view.queries.shape[1] + i + 1
    query = view.queries[query_head, i].double()
    logits = [float(query @ keys[j]) * view.scale for j in range(visible)]
    top = max(logits)
    exps = [math.exp(x - top) for x in logits]
    return [x / sum(exps) for x in exps] + [0.0] * (view.num_resident - visible)


def output_of(values: Tensor, weights: list[float]) -> Tensor:
    """``sum_j weights[j] * values[j]``; values ``[n, D]``."""
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    for weight, value in zip(weights, values.double(), strict=True):
        total += weight * value
    return total


def delta(view: ScoreView) -> Tensor:
    """Literally remove each entry, renormalise, and measure how far the output moves."""
    assert view.queries is not None, "the delta-score needs queries"
    group = view.queries.shape[0] // view.num_kv_heads
    scores = torch.zeros(view.num_kv_heads, view.num_resident, dtype=torch.float64)
    for head in range(view.queries.shape[0]):
        values = view.values[head // group].double()
        for i in range(view.queries.shape[1]):
            weights = weights_of(view, head, i)
            output = output_of(values, weights)
            for j in range(view.num_resident):
                if weights[j] == 0.0:
                    continue
                others = [w if k != j else 0.0 for k, w in enumerate(weights)]
                left = sum(others) or 1.0  # Nothing left: the output becomes 0.
                without = output_of(values, [w / left for w in others])
                moved = (output - without).norm()
                scores[head // group, j] = torch.maximum(scores[head // group, j], moved)
    return scores


def snapkv(view: ScoreView, kernel: int = 7) -> Tensor:
    """Window-mean attention, maximum over ``kernel`` neighbours; the window itself gets the top score."""
    assert view.queries is not None, "SnapKV needs queries"
    heads, n, window = view.num_kv_heads, view.num_resident, view.queries.shape[1]
    group = view.queries.shape[0] // heads
    scores = torch.ones(heads, n, dtype=torch.float64)
    for head in range(heads):
        rows = [weights_of(view, head * group + g, i) for g in range(group) for i in range(window)]
        mean = [sum(row[j] for row in rows) / len(rows) for j in range(n - window)]
        half = kernel // 2
        pooled = [max(mean[max(0, j - half) : j + half + 1]) for j in range(n - window)]
        if pooled:
            scores[head] = torch.tensor(pooled + [max(pooled)] * window)
    return scores


def tova(view: ScoreView) -> Tensor:
    """Mean over all query heads of the last query's weights."""
    assert view.queries is not None, "TOVA needs queries"
    last = view.queries.shape[1] - 1
    rows = [weights_of(view, head, last) for head in range(view.queries.shape[0])]
    mean = torch.tensor([sum(column) / len(rows) for column in zip(*rows, strict=True)], dtype=torch.float64)
    return torch.stack([mean] * view.num_kv_heads)


def keydiff(view: ScoreView) -> Tensor:
    """Minus the cosine between each key and the mean of the unit keys."""
    scores = torch.zeros(view.num_kv_heads, view.num_resident, dtype=torch.float64)
    for head in range(view.num_kv_heads):
        units = [key / key.norm() for key in view.keys[head].double()]
        anchor = sum(units[1:], units[0]) / len(units)
        for j, unit in enumerate(units):
            scores[head, j] = -_cosine(unit, anchor)
    return scores


def _cosine(unit: Tensor, anchor: Tensor) -> float:
    """Of the angle between a unit vector and another one; 0 where that has no direction: keys that cancel out."""
    length = float(anchor.norm())
    return float(unit @ anchor) / length if length else 0.0


def distinct(view: ScoreView) -> Tensor:
    """(1 - cosine between a key and the mean of the unit keys) times the distance of its value from the mean value."""
    apart = keydiff(view) + 1.0
    scores = torch.zeros_like(apart)
    for head in range(view.num_kv_heads):
        values = list(view.values[head].double())
        mean = sum(values[1:], values[0]) / len(values)
        for j, value in enumerate(values):
            scores[head, j] = float(apart[head, j]) * float((value - mean).norm())
    return scores


def features(view: ScoreView, head: int, j: int) -> list[float]:
    """Everything the predictor knows of entry ``j`` of one head."""
    keys, values = list(view.keys[head].double()), list(view.values[head].double())
    key, value = keys[j], values[j]
    half = len(key) // 2
    units = [k / k.norm() for k in keys]
    anchor, mean = sum(units[1:], units[0]), sum(values[1:], values[0]) / len(values)
    if view.seen is not None:
        anchor, mean = view.seen.directions[head].double(), view.seen.values[head].double() / view.seen.count
    return [
        1.0,
        *key.tolist(),
        *(math.hypot(float(key[d]), float(key[d + half])) for d in range(half)),
        *value.tolist(),
        float(key.norm()),
        float(value.norm()),
        _cosine(units[j], anchor),
        float((value - mean).norm()),
    ]


def predictor(view: ScoreView, weights: Tensor) -> Tensor:
    """exp(w . phi) with weights ``[layers, kv heads, features]`` of the layer and head at hand."""
    scores = torch.zeros(view.num_kv_heads, view.num_resident, dtype=torch.float64)
    for head in range(view.num_kv_heads):
        own = weights[view.layer, view.first_head + head].tolist()
        for j in range(view.num_resident):
            terms = zip(own, features(view, head, j), strict=True)
            scores[head, j] = math.exp(sum(w * x for w, x in terms))
    return scores


def predictor_tova(view: ScoreView, weights: Tensor) -> Tensor:
    """The larger of what is predicted of an entry and of the one that the predictor ranks where attention ranks it."""
    expected, attention = predictor(view, weights), tova(view)
    scores = expected.clone()
    for head in range(view.num_kv_heads):
        best_first = sorted(expected[head].tolist(), reverse=True)
        looked_at = attention[head].tolist()
        by_attention = sorted(range(view.num_resident), key=lambda j: (looked_at[j], j), reverse=True)
        for place, j in enumerate(by_attention):
            scores[head, j] = max(float(expected[head, j]), best_first[place])
    return scores


def select(scores: Tensor, keep: int, sink: int, recent: int) -> Tensor:
    """Sort (protected, score, index) downwards, one head at a time."""
    n = scores.shape[1]
    rows = []
    for row in scores.tolist():
        ranked = sorted(range(n), key=lambda j: (j < sink or j >= n - recent, row[j], j), reverse=True)  # noqa: B023
        rows.append(sorted(ranked[:keep]))
    return torch.tensor(rows, dtype=torch.int64).reshape(scores.shape[0], keep)
