# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The two flags on vLLM's command line, and how they become ``additional_config``.

vLLM's parser turns ``--flag.key value`` and YAML maps into further ``--flag '{...}'`` arguments and keeps the
last. Ours are joined instead, and so is ``--additional-config`` when our policy is on.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import logging
from collections.abc import Mapping
from typing import Any

from deltamem_vllm.config import CONFIG_KEY, ConfigError, DeltaMemConfig, check_fields, help_text

logger = logging.getLogger(__name__)

POLICY_FLAG = "--kv-cache-policy"
CONFIG_FLAG = "--deltamem-config"
POLICIES = ("none", "deltamem")

_EARLIER = "_deltamem_earlier_additional_configs"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group ``DeltaMemConfig`` to a parser that has vLLM's engine arguments. Safe to repeat."""
    if POLICY_FLAG in parser._option_string_actions:
        return
    group = parser.add_argument_group(
        title="DeltaMemConfig",
        description="KV-cache eviction by deltamem: hold more context in the same KV memory.",
    )
    group.add_argument(
        POLICY_FLAG,
        choices=POLICIES,
        default=None,
        help="What decides which tokens stay in the KV cache. `none`, or leaving it out, is vLLM's own: all of them.",
    )
    group.add_argument(
        CONFIG_FLAG,
        type=_json_config,
        action=_JoinAction,
        default=None,
        metavar="JSON",
        help=f"Settings of the policy, each also as {CONFIG_FLAG}.NAME VALUE:\n" + help_text().replace("%", "%%"),
    )
    stock = parser._option_string_actions["--additional-config"]
    assert type(stock) is argparse._StoreAction, "vLLM's --additional-config is no plain store action any more"
    stock.__class__ = _RememberingStoreAction
    _fold_after_parsing(parser)


def fold(args: argparse.Namespace) -> None:
    """Move what our flags say into ``args.additional_config``. Safe to call again.

    Raises
    ------
    ConfigError
        Flags that contradict each other.
    """
    policy = getattr(args, "kv_cache_policy", None)
    flag_config = getattr(args, "deltamem_config", None)
    earlier = vars(args).pop(_EARLIER, [])
    additional = getattr(args, "additional_config", None) or {}
    everything: dict[str, Any] = {}
    for given_config in [*earlier, additional]:
        everything = _join(everything, given_config)
    in_additional = CONFIG_KEY in everything

    if policy == "none" and (in_additional or flag_config is not None):
        given = CONFIG_FLAG if flag_config is not None else f"--additional-config with key {CONFIG_KEY!r}"
        raise ConfigError(
            f"got {POLICY_FLAG} none together with {given}; drop one of them: {POLICY_FLAG} deltamem uses "
            "the configuration, without it the policy stays off"
        )
    if policy is None and flag_config is not None:
        raise ConfigError(
            f"got {CONFIG_FLAG} without {POLICY_FLAG} deltamem, so it would have no effect; "
            f"add {POLICY_FLAG} deltamem or drop {CONFIG_FLAG}"
        )
    if policy != "deltamem" and not in_additional:
        # Not ours: the last --additional-config wins, as vLLM has it.
        return
    config = _agree(flag_config, everything.get(CONFIG_KEY))
    DeltaMemConfig.from_dict(config)
    args.additional_config = {**everything, CONFIG_KEY: config}


def _agree(flag_config: Mapping[str, Any] | None, additional: Any) -> dict[str, Any]:
    """One configuration from our flag and from --additional-config: joined where they do not contradict."""
    check_fields(additional or {})
    flags, others = dict(flag_config or {}), dict(additional or {})
    differ = [key for key in flags if key in others and flags[key] != others[key]]
    if differ:
        listed = ", ".join(f"{key} ({flags[key]!r} against {others[key]!r})" for key in differ)
        raise ConfigError(
            f"{CONFIG_FLAG} and --additional-config.{CONFIG_KEY} set different values for {listed}; "
            f"give each key once, preferably with {CONFIG_FLAG}"
        )
    return {**others, **flags}


def _json_config(text: str) -> dict[str, Any]:
    """Type of ``--deltamem-config``: argparse puts the flag's name before what is raised here."""
    try:
        given = json.loads(text)
        check_fields(given)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, which is not JSON ({error}); expected an object like '{{\"keep_ratio\": 0.25}}'"
        ) from error
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    assert isinstance(given, dict)
    return given


class _JoinAction(argparse.Action):
    """Repeated occurrences are joined; for one key the later wins: a command line over its YAML file."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        earlier = getattr(namespace, self.dest) or {}
        for key in earlier.keys() & values.keys():
            if earlier[key] != values[key]:
                logger.warning("%s.%s: %r replaces %r", CONFIG_FLAG, key, values[key], earlier[key])
        setattr(namespace, self.dest, {**earlier, **values})


class _RememberingStoreAction(argparse._StoreAction):
    """vLLM's store action, which also keeps what it replaces until `fold` knows whether to join."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        previous = getattr(namespace, self.dest, self.default)
        if previous is not self.default:
            setattr(namespace, _EARLIER, [*getattr(namespace, _EARLIER, []), previous])
        super().__call__(parser, namespace, values, option_string)


def _fold_after_parsing(parser: argparse.ArgumentParser) -> None:
    """Fold on this parser as soon as it has read everything, so that child processes get folded arguments."""
    original = parser.parse_known_args

    @functools.wraps(original)
    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = original(*args, **kwargs)
        try:
            fold(namespace)
        except ConfigError as error:
            parser.error(str(error))
        return namespace, rest

    # On the instance: only parsers that got our flags behave differently.
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _join(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both objects as one, maps inside too; the second wins where both have a plain value."""
    joined = copy.deepcopy(dict(first))
    for key, value in second.items():
        if isinstance(value, Mapping) and isinstance(joined.get(key), Mapping):
            joined[key] = _join(joined[key], value)
        else:
            joined[key] = copy.deepcopy(value)
    return joined
