# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The judge: a plain float32 transformers model that is told, entry by entry, what it may see.

It shares no code with the engine or the policy. For every finished request it replays the engine's own tokens
with an explicit boolean mask per (layer, kv head, query, key), built from the recorded survivors, and
compares log-probs. Tokens that were coded are given to it as the bytes of their pages say, once it has found that they
are what its own keys and values become when they are coded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from held import Coded, View, replay
from scenario import Compaction, Output, Result
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Change = Literal["", "survivor", "coded", "exact"]
"""What a control puts wrong, in each compaction: "survivor" moves one survivor to a neighbouring token, "coded" gives
one coded token in one head of each layer what stands for its neighbour, "exact" takes no token for coded."""

# (layer) -> [H_kv, N, N] bool, True = visible; and what is coded there. Set around one forward pass.
_visible: list[Tensor] = []
_coded: list[Coded] = []
_check_coded = [True]


def _masked_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Textbook attention; query ``[1, H_q, N, D]``, key and value ``[1, H_kv, N, D]``."""
    kv_heads = key.shape[1]
    grouped = query[0].unflatten(0, (kv_heads, -1))
    logits = torch.einsum("hgqd,hkd->hgqk", grouped, key[0]) * scaling
    coded = _coded[module.layer_idx] if _coded else None
    late = torch.zeros((), dtype=torch.bool)
    if coded is not None:
        if _check_coded[0]:
            coded.check(key[0], value[0])
        # [H_kv, 1, N, N]: this query reads that token as it was coded.
        late = (torch.arange(key.shape[2]).unsqueeze(1) >= coded.since.unsqueeze(1)).unsqueeze(1)
        logits = torch.where(late, torch.einsum("hgqd,hkd->hgqk", grouped, coded.keys) * scaling, logits)
    logits = logits.masked_fill(~_visible[module.layer_idx].unsqueeze(1), float("-inf"))
    weights = logits.softmax(-1)
    if coded is None:
        mixed = torch.einsum("hgqk,hkd->qhgd", weights, value[0])
    else:
        mixed = torch.einsum("hgqk,hkd->qhgd", weights.masked_fill(late, 0.0), value[0])
        mixed = mixed + torch.einsum("hgqk,hkd->qhgd", weights.masked_fill(~late, 0.0), coded.values)
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

    def check(self, result: Result, change: Change = "", within_bounds: bool = True) -> list[TokenCheck]:
        """Compare every token of every finished request.

        Parameters
        ----------
        result: of the run to judge.
        change: put something wrong first. The comparison must then fail; it proves that the check sees a single wrong
            entry in a single head.
        within_bounds: see `logprobs`.
        """
        checks: list[TokenCheck] = []
        for output in result.outputs:
            checks += self._check_request(result, output, change, within_bounds)
        return checks

    def _check_request(self, result: Result, output: Output, change: Change, within_bounds: bool) -> list[TokenCheck]:
        sequence = output.prompt + output.tokens
        inputs = sequence[:-1]
        first = len(output.prompt) - 1  # position that predicts output token 0
        dense = self.logprobs(inputs, self.view(len(inputs), result, []).visible)
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
            masked = dense
            if events:
                view = self.view(len(inputs), result, events, change == "survivor")
                if change == "coded":
                    for coded in view.coded:
                        coded.move_one()
                read_as_coded = None if change == "exact" else view.coded
                masked = self.logprobs(inputs, view.visible, read_as_coded, within_bounds)
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

    def view(self, n: int, result: Result, events: list[Compaction], shift: bool = False) -> View:
        """What queries read after the compactions of one epoch; see `held.replay`."""
        return replay((self.layers, self.kv_heads), n, result, events, shift)

    @torch.inference_mode()
    def logprobs(
        self, inputs: list[int], visible: list[Tensor], coded: list[Coded] | None = None, within_bounds: bool = True
    ) -> Tensor:
        """Log-probs ``[N, vocab]`` of the next token at every position.

        Parameters
        ----------
        inputs: tokens.
        visible, coded: of each layer, as in `held.View`.
        within_bounds: require of coded tokens that they stand for the model's own keys and values.
        """
        _visible[:] = visible
        _coded[:] = coded or []
        _check_coded[0] = within_bounds
        return self.model(torch.tensor([inputs])).logits[0].float().log_softmax(-1)


def same_request(internal: str, external: str) -> bool:
    """Whether an id of the engine's is that of a request as its caller named it."""
    return internal == external or internal.startswith(external + "-")
