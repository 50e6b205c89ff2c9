# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The judge: a plain float32 transformers model that is told, entry by entry, what it may see.

It shares no code with the engine or the policy. For every finished request it replays the engine's own tokens
with an explicit boolean mask per (layer, kv head, query, key), built from the recorded survivors, and
compares log-probs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scenario import BLOCK_SIZE, Compaction, Output, Result
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Survivors = list[list[Tensor]]
"""[layer][kv head], each ``[kept]`` int64: ascending indices into the resident entries of that pair."""

# (layer) -> [H_kv, N, N] bool, True = visible; set around one forward pass.
_visible: list[Tensor] = []


def _masked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Textbook attention; query ``[1, H_q, N, D]``, key and value ``[1, H_kv, N, D]``."""
    kv_heads = key.shape[1]
    grouped = query[0].unflatten(0, (kv_heads, -1))
    logits = torch.einsum("hgqd,hkd->hgqk", grouped, key[0]) * scaling
    logits = logits.masked_fill(~_visible[module.layer_idx].unsqueeze(1), float("-inf"))
    mixed = torch.einsum("hgqk,hkd->qhgd", logits.softmax(-1), value[0])
    return mixed.flatten(1, 2).unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register("deltamem_masked_reference", _masked_attention)


@dataclass(frozen=True)
class TokenCheck:
    """One generated token: the engine's log-prob against the reference with and without the eviction mask."""

    request: str
    index: int
    error: float
    control: float
    evicted: bool
    """Whether something had been evicted from the request when this token was computed."""


class Reference:
    """A checkpoint, loaded once, judged against many runs."""

    def __init__(self, model: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="deltamem_masked_reference"
        ).eval()
        config = self.model.config
        self.layers: int = config.num_hidden_layers
        self.kv_heads: int = config.num_key_value_heads

    def check(self, result: Result, shift_survivor: bool = False) -> list[TokenCheck]:
        """Compare every token of every finished request.

        Parameters
        ----------
        result: of the run to judge.
        shift_survivor: move one survivor to a neighbouring token first. The comparison must then fail; it
            proves
            that the check sees a single wrong entry in a single head.
        """
        checks: list[TokenCheck] = []
        for output in result.outputs:
            checks += self._check_request(result, output, shift_survivor)
        return checks

    def _check_request(self, result: Result, output: Output, shift: bool) -> list[TokenCheck]:
        sequence = output.prompt + output.tokens
        inputs = sequence[:-1]
        first = len(output.prompt) - 1  # position that predicts output token 0
        dense = self.logprobs(inputs, self.masks(len(inputs), result, []))
        # A preemption throws all KV away and everything is computed again, densely: a new epoch. A token
        # belongs to the epoch in which its step was scheduled, whatever happened before it was delivered.
        starts = [0] + [p.step for p in result.preemptions if same_request(p.request, output.request)]
        checks: list[TokenCheck] = []
        for start, end in zip(starts, [*starts[1:], 1 << 62], strict=True):
            indices = [i for i, step in enumerate(output.steps) if start <= step < end]
            if not indices:
                continue
            events = [
                c for c in result.compactions if same_request(c.request, output.request) and start <= c.step < end
            ]
            masked = self.logprobs(inputs, self.masks(len(inputs), result, events, shift)) if events else dense
            for i in indices:
                at, token = first + i, output.tokens[i]
                checks.append(
                    TokenCheck(
                        request=output.request,
                        index=i,
                        error=abs(masked[at, token].item() - output.logprobs[i]),
                        control=abs(dense[at, token].item() - output.logprobs[i]),
                        evicted=any(c.step <= output.steps[i] for c in events),
                    )
                )
        assert len(checks) == len(output.tokens), f"{output.request}: some tokens belong to no epoch"
        return checks

    def masks(self, n: int, result: Result, events: list[Compaction], shift: bool = False) -> list[Tensor]:
        """Visibility ``[H_kv, n, n]`` of each layer after the compactions of one epoch, in order."""
        visible = torch.ones(n, n, dtype=torch.bool).tril().repeat(self.layers, self.kv_heads, 1, 1)
        # Per (layer, kv head): resident entry -> token. Pairs hold different numbers of entries once pages were dealt.
        resident = {pair: torch.arange(0) for pair in itertools.product(range(self.layers), range(self.kv_heads))}
        seen = 0
        previous: Compaction | None = None
        for event in events:
            tail = torch.arange(seen, event.logical_len)
            resident = {pair: torch.cat([tokens, tail]) for pair, tokens in resident.items()}
            seen = event.logical_len
            survivors: Survivors = torch.load(Path(result.directory, event.file))
            check_counts(event, previous)
            check_survivors(event, survivors, self._lengths(resident), result.ranks)
            if shift:
                survivors = _shift_one(survivors)
            resident = {(layer, head): tokens[survivors[layer][head]] for (layer, head), tokens in resident.items()}
            previous = event
            if seen >= n:
                continue
            # Tokens computed from now on see, of all earlier tokens, the survivors only.
            for (layer, head), tokens in resident.items():
                visible[layer, head, seen:, :seen] = False
                visible[layer, head, seen:, tokens] = True
        return list(visible)

    def _lengths(self, resident: dict[tuple[int, int], Tensor]) -> list[list[int]]:
        return [[len(resident[layer, head]) for head in range(self.kv_heads)] for layer in range(self.layers)]

    @torch.inference_mode()
    def logprobs(self, inputs: list[int], visible: list[Tensor]) -> Tensor:
        """Log-probs ``[N, vocab]`` of the next token at every position."""
        _visible[:] = visible
        return self.model(torch.tensor([inputs])).logits[0].float().log_softmax(-1)


def same_request(internal: str, external: str) -> bool:
    """Whether an id of the engine's is that of a request as its caller named it."""
    return internal == external or internal.startswith(external + "-")


def check_counts(event: Compaction, previous: Compaction | None) -> None:
    """The scheduler's arithmetic, in nominal tokens: what a table of that many blocks holds.

    Parameters
    ----------
    event: to check.
    previous: the request's compaction before it, if it had one since it (re)started.
    """
    where = _where(event)
    kept, seen = (previous.keep, previous.logical_len) if previous else (0, 0)
    before = kept + event.logical_len - seen
    assert event.resident_before == before, f"{where}: {event.resident_before} resident tokens, expected {before}"
    assert event.evicted_before == event.logical_len - before, f"{where}: wrong evicted_before"
    assert event.evicted_after == event.logical_len - event.keep, f"{where}: wrong evicted_after"
    assert event.target_blocks == -(-event.keep // BLOCK_SIZE), f"{where}: {event.target_blocks} target blocks"
    if event.dealing == "equal":
        assert event.serial == 0, f"{where}: nothing was dealt, but its serial is {event.serial}"
        return
    assert event.keep == event.target_blocks * BLOCK_SIZE, f"{where}: {event.keep} tokens are not whole blocks"
    assert event.serial > (previous.serial if previous else 0), f"{where}: serial {event.serial} is not new"


def check_survivors(event: Compaction, survivors: Survivors, lengths: list[list[int]], ranks: int) -> None:
    """Every pair keeps entries it has, sinks and recent ones among them, and no page is dealt twice or left over.

    Parameters
    ----------
    event: to check.
    survivors: what the workers recorded.
    lengths: ``[layer][kv head]``, entries of each pair before the compaction.
    ranks: tensor-parallel ranks; each deals the pages of its own kv heads.
    """
    where = _where(event)
    shape = [len(heads) for heads in survivors]
    assert shape == [len(heads) for heads in lengths], f"{where}: survivors of {shape} heads"
    sink = torch.arange(event.sink_tokens)
    for layer, heads in enumerate(survivors):
        for head, index in enumerate(heads):
            pair, n = f"{where}, layer {layer}, head {head}", lengths[layer][head]
            assert (index.diff() > 0).all(), f"{pair}: survivors are not ascending"
            assert len(index) >= event.sink_tokens + event.recent_tokens, f"{pair}: only {len(index)} survivors"
            assert index[0] >= 0, f"{pair}: negative index"
            assert index[-1] < n, f"{pair}: index past the {n} resident entries"
            assert (index[: event.sink_tokens] == sink).all(), f"{pair}: a sink was evicted"
            recent = torch.arange(n - event.recent_tokens, n)
            assert (index[len(index) - event.recent_tokens :] == recent).all(), f"{pair}: a recent token lost"
            if event.dealing == "equal":
                assert len(index) == event.keep, f"{pair}: {len(index)} survivors"
            else:
                assert len(index) > 0, f"{pair}: no page"
                assert len(index) % BLOCK_SIZE == 0, f"{pair}: {len(index)} survivors are not whole pages"
    if event.dealing == "equal":
        return
    per_rank = shape[0] // ranks
    for first in range(0, shape[0], per_rank):
        mine = [len(index) // BLOCK_SIZE for heads in survivors for index in heads[first : first + per_rank]]
        wanted = event.target_blocks * len(mine)
        assert sum(mine) == wanted, f"{where}: {sum(mine)} pages dealt from {wanted}, kv heads from {first} on"


def _where(event: Compaction) -> str:
    return f"compaction of {event.request} in step {event.step}"


def _shift_one(survivors: Survivors) -> Survivors:
    """Replace one survivor of the pair that kept the fewest by the evicted entry next to it.

    One that has fewer entries leans on each of them more, so that a single wrong one shows.
    """
    _, layer, head = min(
        (len(index), layer, head) for layer, heads in enumerate(survivors) for head, index in enumerate(heads)
    )
    row = survivors[layer][head].tolist()
    kept = set(row)
    # From the newest on: attention of random weights rarely ignores a late entry altogether.
    for position in reversed(range(len(row))):
        if row[position] - 1 >= 0 and row[position] - 1 not in kept:
            shifted = [list(heads) for heads in survivors]
            shifted[layer][head] = survivors[layer][head].clone()
            shifted[layer][head][position] -= 1
            return shifted
    raise AssertionError("nothing was evicted, so no survivor can be shifted")
