# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A model's sizes: from its own config.json, a shipped one, or Hugging Face."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamem_vllm.evaluation.plan.catalog import did_you_mean, find_known_model, known_models
from deltamem_vllm.evaluation.plan.errors import PlanError
from deltamem_vllm.evaluation.plan.formats import WeightFormat
from deltamem_vllm.evaluation.plan.tensors import Parameter, build_parameters
from deltamem_vllm.models.full_attention import other_than_full_attention

_REQUIRED = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings")


@dataclass(frozen=True)
class Geometry:
    """What the plan needs to know of a model.

    Attributes
    ----------
    name: as it was given.
    source: where the sizes come from.
    serve: what stands for the model in a printed command.
    head_size, hidden, intermediate, vocabulary: values.
    max_positions: tokens the model was made for; longer contexts are not planned.
    experts_per_token: 1 for a dense model.
    quantized: method of an already quantised checkpoint, or None.
    parameters: every tensor, tied ones once.
    """

    name: str
    source: str
    serve: str
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    hidden: int
    intermediate: int
    vocabulary: int
    max_positions: int
    experts_per_token: int
    quantized: str | None
    parameters: tuple[Parameter, ...]

    @property
    def parameter_count(self) -> int:
        return sum(p.count for p in self.parameters)

    def counts_by_kind(self) -> dict[str, int]:
        """Parameters of each kind of tensor."""
        kinds: dict[str, int] = {}
        for p in self.parameters:
            kinds[p.kind] = kinds.get(p.kind, 0) + p.count
        return kinds

    def weight_bytes(self, form: WeightFormat, ranks: int) -> int:
        """Bytes of the parameters on one of ``ranks`` tensor-parallel ranks."""
        return sum(p.rank_bytes(form, self, ranks) for p in self.parameters)

    def layer_bytes(self, form: WeightFormat, ranks: int) -> int:
        """The part of `weight_bytes` that belongs to decoder layers."""
        return sum(p.rank_bytes(form, self, ranks) for p in self.parameters if p.layer)

    def rank_query_heads(self, ranks: int) -> int:
        if self.query_heads % ranks:
            raise PlanError(f"--count {ranks}: {self.query_heads} query heads cannot be split into {ranks} equal parts")
        return self.query_heads // ranks

    def rank_kv_heads(self, ranks: int) -> int:
        """KV heads on one rank; with more ranks than heads each rank holds a copy of one."""
        if max(ranks, self.kv_heads) % min(ranks, self.kv_heads):
            raise PlanError(
                f"--count {ranks}: {self.kv_heads} KV heads can be neither split into nor copied to {ranks} equal parts"
            )
        return max(1, self.kv_heads // ranks)

    def token_bytes(self, element_bytes: int, ranks: int) -> int:
        """KV cache of one token on one rank: keys and values in every layer."""
        return self.layers * self.rank_kv_heads(ranks) * self.head_size * 2 * element_bytes


def load_geometry(name: str) -> Geometry:
    """Find a model and read its sizes.

    Tried in this order: a folder with a config.json, an embedded model, a shipped geometry, a Hugging Face id.

    Raises
    ------
    PlanError
        Nothing has that name, or the model is of a kind that is not planned.
    """
    config, source, serve = _find_config(name)
    _refuse_unplanned(config, name)
    heads = config.num_attention_heads
    return Geometry(
        name=name,
        source=source,
        serve=serve,
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        max_positions=config.max_position_embeddings,
        experts_per_token=getattr(config, "num_experts_per_tok", None) or 1,
        quantized=_quantized(config),
        parameters=build_parameters(config),
    )


def _find_config(name: str) -> tuple[Any, str, str]:
    """The configuration, where it came from, and how a command names the model."""
    from transformers import AutoConfig

    from deltamem_vllm.models.catalog import CATALOG, resolve_model

    if (Path(name) / "config.json").is_file():
        return AutoConfig.from_pretrained(name), "its config.json", shlex.quote(name)
    if name in CATALOG:
        path = resolve_model(name)
        return AutoConfig.from_pretrained(path), "the embedded model's config.json", f'"$(deltamem model path {name})"'
    if (known := find_known_model(name)) is not None:
        config = AutoConfig.for_model(**known.config)
        return config, "sizes shipped with deltamem", known.ids[0]
    available = ", ".join(known_models())
    if name.count("/") != 1:
        hint = did_you_mean(name, [*known_models(), *CATALOG])
        raise PlanError(
            f"unknown model {name!r}{hint}; give a folder with a config.json, "
            f"a Hugging Face id, or one of: {', '.join(CATALOG)}, {available}"
        )
    try:
        return AutoConfig.from_pretrained(name), "its config.json on Hugging Face", name
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PlanError(
            f"cannot read the configuration of {name!r}: {reason} Without a network, give a folder with a "
            f"config.json or one of: {', '.join(CATALOG)}, {available}"
        ) from error


def _refuse_unplanned(config: Any, name: str) -> None:
    """Raise for models whose KV cache is more than full attention with one shape in every layer."""
    found = other_than_full_attention(config)
    missing = [field for field in _REQUIRED if not isinstance(getattr(config, field, None), int)]
    if not found and missing:
        found = f"no {', '.join(missing)} in its configuration"
    if found:
        raise PlanError(
            f"{name} has {found}; planned are decoder-only text models with full attention in every layer, which is "
            "also what deltamem serves. vLLM itself prints what fits when it starts such a model"
        )


def _quantized(config: Any) -> str | None:
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
    return str(getattr(method, "value", method))
