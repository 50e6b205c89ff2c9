# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a profile compares: the same memory in equal shares and dealt, of which one is what the engine did."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltamem_vllm.evaluation.profile.dealt import Dealt
from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.meaning import meaning_of


@dataclass(frozen=True)
class Comparison:
    """Equal shares beside others, after the first compaction.

    Parameters
    ----------
    equal, dealt
        The same memory, shared out; of the two, only what is dealt can be coded in part.
    done
        Whether `dealt` is what the engine did; else it did `equal`.
    basis
        What `dealt` goes by, in words.
    tokens
        Resident tokens of each head before.
    """

    equal: Dealt
    dealt: Dealt
    done: bool
    basis: str
    tokens: int

    @property
    def ratio(self) -> NDArray[np.float64]:
        """[L, H_kv] memory of a head if dealt, over its equal share."""
        return self.dealt.memory / self.equal.memory


def comparison_of(profile: Profile) -> Comparison:
    """What was dealt beside equal shares; where shares were equal, one ranking over all heads beside them."""
    done = profile.dealing != "equal"
    ranking = meaning_of(profile.scorer).ranking
    measure = "utility" if ranking == "by_utility" else "window attention"
    return Comparison(
        equal=profile.dealt["equal" if done else "done"],
        dealt=profile.dealt["done" if done else ranking],
        done=done,
        basis=_basis(profile) if done else f"one ranking of {measure} over all layers and heads",
        tokens=int(profile.compactions[0].facts["resident_before"]),
    )


def budget_words(profile: Profile) -> str:
    """The part of the policy that says how much stays."""
    policy = profile.engine["policy"]
    if policy["coverage"] is not None:
        return f"coverage {policy['coverage']:g}"
    if policy["keep_tokens"] is not None:
        return f"keep_tokens {policy['keep_tokens']:,}"
    return f"keep_ratio {policy['keep_ratio']:g}"


def cold_words(profile: Profile) -> str:
    """What a coded token and a cold page are; empty where no page can be cold."""
    cold = profile.engine["cold"]
    return "" if cold is None else f"{cold['bits']} bits, up to {cold['page_tokens']:,} to a page"


def _basis(profile: Profile) -> str:
    """What the engine dealt pages by, see `dealing.dealer.Dealer`."""
    live = profile.dealing == "global" and profile.engine["comparable_scores"]
    calibrated = profile.engine["calibration"] is not None
    if live:
        return "the utility of this prompt" + (" and the model's calibration" if calibrated else "")
    if calibrated:
        return "the model's calibration"
    return f"nothing, so equal: scores of {profile.scorer} do not compare, and the model has no calibration"
