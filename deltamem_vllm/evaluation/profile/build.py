# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The two ends of a profile: what is checked before the engine runs, and what is worked out from its recording."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltamem_vllm.config import ConfigError, DeltaMemConfig
from deltamem_vllm.evaluation.profile.analysis import deal, equal_split
from deltamem_vllm.evaluation.profile.dealt import Dealt
from deltamem_vllm.evaluation.profile.document import Profile, encode_utility
from deltamem_vllm.evaluation.profile.errors import ProfileError
from deltamem_vllm.evaluation.profile.held import held_after
from deltamem_vllm.evaluation.profile.recording import Recording
from deltamem_vllm.memory.budgets import budget_for, cdiv
from deltamem_vllm.request_options import RequestOptions


@dataclass(frozen=True)
class Settings:
    """How the engine runs.

    Parameters
    ----------
    model
        An embedded model's name, a Hugging Face id or a local path.
    output_tokens
        Tokens to generate, >= 2: the first comes from the prompt's own pass, before anything is evicted.
    chunk
        Tokens of the prompt per engine step.
    block
        Tokens per block of the KV cache.
    """

    model: str
    output_tokens: int
    chunk: int
    block: int


def policy_of(given: Mapping[str, Any]) -> DeltaMemConfig:
    """The policy with these fields, and what a profile needs.

    The prompt is always compacted, however empty the pool is, and the window is recorded for scorers that read no
    queries, too.

    Raises
    ------
    ProfileError
        An unknown key, a value out of range, or a scorer that is not installed.
    """
    # The worker records queries if any scorer that a request could name reads them, and tova does.
    try:
        policy = DeltaMemConfig.from_dict({**given, "mode": "always", "request_scorers": ["tova"]})
        policy.check_scorers()
    except ConfigError as error:
        raise ProfileError(str(error)) from error
    return policy


def tokens_kept(policy: DeltaMemConfig, prompt_tokens: int, block: int) -> int:
    """Tokens that the first compaction leaves of a prompt (nominal), at most: with `coverage`, the prompt decides.

    Raises
    ------
    ProfileError
        The policy would leave such a prompt alone.
    """
    if prompt_tokens < policy.min_tokens:
        raise ProfileError(
            f"the prompt has {prompt_tokens} tokens, and the policy leaves requests under min_tokens="
            f"{policy.min_tokens} alone, so there is nothing to see; give a longer prompt (--length for the built-in "
            f"one), or lower the limit with --deltamem-config '{{\"min_tokens\": {prompt_tokens}}}'"
        )
    budget = budget_for(RequestOptions.from_extra_args(None, policy), policy)
    assert budget is not None, "only a request can turn the policy off for itself"
    least = budget.least_tokens(prompt_tokens, block)
    if cdiv(least, block) >= cdiv(prompt_tokens, block):
        share, lower = f"keep_ratio={policy.keep_ratio}", "--keep-ratio"
        if policy.keep_tokens is not None:
            share, lower = f"keep_tokens={policy.keep_tokens}", "keep_tokens"
        raise ProfileError(
            f"{share} keeps {least} of the prompt's {prompt_tokens} tokens, which frees no block of {block} tokens, so "
            f"nothing would be compacted; give a lower {lower} or a longer prompt"
        )
    return budget.deserved_tokens(prompt_tokens, prompt_tokens, block)


def check_length(prompt_tokens: int, output_tokens: int, positions: int) -> None:
    """Raise `ProfileError` if prompt and output do not fit into the model's positions."""
    if prompt_tokens + output_tokens > positions:
        raise ProfileError(
            f"{prompt_tokens} prompt tokens and {output_tokens} output tokens are {prompt_tokens + output_tokens}, "
            f"and the model has {positions} positions; shorten the prompt to {max(positions - output_tokens, 0)} "
            "tokens or lower --output-tokens"
        )


def assemble(
    recording: Recording, engine: Mapping[str, Any], prompt: Mapping[str, Any], conditions: Mapping[str, Any]
) -> Profile:
    """Work out from a recording what a profile has beyond it."""
    codes, scale = encode_utility(recording.utility)
    return Profile(
        conditions=conditions,
        engine=engine,
        prompt=prompt,
        steps=recording.steps,
        compactions=recording.compactions,
        counters=recording.counters,
        codes=codes,
        scale=scale,
        dealt=shares(recording, engine["block_tokens"]),
    )


def shares(recording: Recording, block_tokens: int) -> dict[str, Dealt]:
    """What the first compaction left each layer and head, and what the same memory would be in other hands.

    Parameters
    ----------
    block_tokens
        Exact tokens of a page.
    """
    first = recording.compactions[0]
    sizes = (first.facts["keep"], first.facts["sink_tokens"], first.facts["recent_tokens"])
    utility = recording.utility if bool((recording.utility >= 0).all()) else None
    others = {
        "equal": equal_split(recording.utility, *sizes),
        "by_utility": deal(recording.utility, *sizes),
        "by_attention": deal(recording.attention, *sizes),
    }
    held, tokens = held_after([first], block_tokens)[0], recording.utility.shape[2]
    memory = held.exact.counts + held.sizes.counts * block_tokens
    done = Dealt.of(held.exact.mask(tokens), held.coded.mask(tokens), memory, recording.attention, utility)
    return {"done": done} | {
        name: Dealt.of(mask, np.zeros_like(mask), mask.sum(2), recording.attention, utility)
        for name, mask in others.items()
    }
