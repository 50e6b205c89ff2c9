# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What the utilities of a scorer are, and whether those of two heads may be compared.

That is about their unit. Whether they also tell what a head will need later, so that pages may be dealt by them, is a
stricter question, which a scorer answers itself (`Scorer.comparable`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Comparable = Literal["yes", "partly", "no", "unknown"]


@dataclass(frozen=True)
class Meaning:
    """What a utility is.

    Parameters
    ----------
    quantity
        In words.
    comparable
        Whether equal utilities of two heads are equal amounts, so that one ranking over all of them has a meaning.
    why
        The reason, as a sentence.
    """

    quantity: str
    comparable: Comparable
    why: str

    @property
    def ranking(self) -> Literal["by_utility", "by_attention"]:
        """What to deal memory by: the attention of the window where utilities do not compare."""
        return "by_utility" if self.comparable in ("yes", "partly") else "by_attention"


_MASS = "Each head's attention sums to 1, so equal values are equal shares of what a head reads."

_MEANINGS = {
    "tova": Meaning("attention of the newest query, mean over the layer's heads", "yes", _MASS),
    "snapkv": Meaning("attention of the window, max-pooled over neighbours", "yes", _MASS),
    "delta": Meaning(
        "distance that the head's output moves without the token",
        "partly",
        "It is measured in the head's own output, whose size differs between heads and layers.",
    ),
    "predictor": Meaning(
        "attention to come and what it will move, as the model's calibration predicts",
        "yes",
        "Every head's prediction is of the same thing: the largest share of a query's attention.",
    ),
    "predictor-tova": Meaning(
        "what the predictor expects, of this token or of the one that it ranks where the newest query ranks this one",
        "yes",
        "The numbers are predictions, all of one thing; which token has which is partly the newest query's choice.",
    ),
    "distinct": Meaning(
        "distance of key and value from those of their head",
        "yes",
        "Both distances are small in a head that keeps saying the same.",
    ),
    "keydiff": Meaning(
        "negative cosine to the mean key",
        "no",
        "A cosine says how unlike a key is to those of its own head, not how much the head matters.",
    ),
    "streaming": Meaning("index among the resident tokens", "no", "It is the same in every head."),
    "random": Meaning("random number", "no", "It means nothing in any head."),
}


def meaning_of(scorer: str) -> Meaning:
    """What is known of a scorer's utilities; scorers of other packages are `unknown`."""
    return _MEANINGS.get(
        scorer,
        Meaning(f"score of {scorer!r}", "unknown", "Its author has not said whether its scores compare between heads."),
    )
