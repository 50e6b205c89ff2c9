# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Prompts of random tokens, as `vllm bench`'s random dataset makes them, but with no common part."""

from __future__ import annotations

import random

# Special tokens sit at the start of a vocabulary, or at its very end.
_MARGIN = 256


def random_prompts(count: int, tokens: int, vocabulary: int, seed: str) -> list[list[int]]:
    """Return `count` prompts of `tokens` token ids each.

    Parameters
    ----------
    vocabulary : int
        Size of the model's vocabulary. Ids near its two ends are left out if it is large enough.
    seed : str
        The same seed gives the same prompts, on any machine. Give each repeat its own: prompts that come
        again are answered from the prefix cache.
    """
    margin = _MARGIN if vocabulary > 4 * _MARGIN else 0
    draw = random.Random(seed)
    return [[draw.randrange(margin, vocabulary - margin) for _ in range(tokens)] for _ in range(count)]
