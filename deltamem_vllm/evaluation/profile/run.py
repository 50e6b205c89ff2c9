# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""From what the user asked for to a profile: the prompt, the engine, the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.evaluation.machine import command_line, describe_code, describe_machine
from deltamem_vllm.evaluation.profile.build import Settings, assemble, check_length, tokens_kept
from deltamem_vllm.evaluation.profile.document import Profile
from deltamem_vllm.evaluation.profile.engine import Engine, engine_args
from deltamem_vllm.evaluation.profile.errors import ProfileError
from deltamem_vllm.evaluation.profile.prompt import Prompts, Wanted
from deltamem_vllm.models.catalog import resolve_model

# Of this package and its neighbours, what decides the figures; see `machine.describe_code`.
_DECISIVE = ("child.py", "stepped_engine.py", "needle.py", "profile/", "prose.py")


def parse_fields(given: str) -> dict[str, Any]:
    """Policy fields from JSON; those with a flag of their own are refused."""
    try:
        fields = json.loads(given)
    except ValueError as error:
        raise ProfileError(f"--deltamem-config {given!r} is no JSON ({error}); give an object in quotes") from error
    if not isinstance(fields, dict):
        raise ProfileError(f"--deltamem-config must be a JSON object like '{{\"interval\": 64}}', got {given}")
    for name in ("scorer", "keep_ratio", "dealing", "seed"):
        if name in fields:
            raise ProfileError(f"--deltamem-config sets {name}; give it as --{name.replace('_', '-')}")
    if "mode" in fields:
        raise ProfileError("--deltamem-config sets mode, but a profile always compacts its prompt; leave mode out")
    if "request_scorers" in fields:
        raise ProfileError("--deltamem-config sets request_scorers, but a profile has one request and one --scorer")
    return fields


def run_profile(
    wanted: Wanted, policy: DeltaMemConfig, settings: Settings, log: Path, say: Callable[[str], None]
) -> Profile:
    """Make the prompt, run it through an engine, and work out the profile.

    Parameters
    ----------
    policy
        From `build.policy_of`.
    log
        Where the engine's output goes.
    say
        Gets a line at each stage.

    Raises
    ------
    ProfileError
        Prompt and policy do not fit each other or the model.
    ModelError
        An embedded model cannot be prepared.
    ChildFailed
        The engine did not start or broke off; the message has the end of its log.
    """
    text = wanted.read()
    path = resolve_model(settings.model)
    tokenizer, positions = _load(path)
    prompts = Prompts(tokenizer, chat=wanted.chat)
    if text is None:
        check_length(wanted.length, settings.output_tokens, positions)
        prompt = prompts.needle(wanted.length, wanted.seed)
    else:
        source = "--text" if wanted.file is None else wanted.file.name
        prompt = prompts.from_text(text, source, wanted.marked)
    tokens = len(prompt.token_ids)
    check_length(tokens, settings.output_tokens, positions)
    arguments = engine_args(
        path,
        policy.to_json_dict(),
        prompt_tokens=tokens,
        output_tokens=settings.output_tokens,
        keep=tokens_kept(policy, tokens, settings.block),
        chunk=settings.chunk,
        block=settings.block,
    )
    say("starting the engine")
    with Engine(arguments, log) as engine:
        say(f"serving {tokens:,} + {settings.output_tokens:,} tokens")
        recording = engine.record(prompt.token_ids, settings.output_tokens)
        facts = engine.facts
    conditions = {
        # A user's text stays out of the profile, this way too.
        "command": command_line() if wanted.text is None else command_line().replace(wanted.text, "..."),
        # Not a path of this machine: profiles are shared.
        "model": Path(settings.model).name if Path(settings.model).is_dir() else settings.model,
        "machine": describe_machine(),
        "code": describe_code(_DECISIVE),
    }
    return assemble(recording, facts, prompt.facts(prompts.decode(list(recording.written))), conditions)


def _load(path: str) -> tuple[Any, int]:
    """The tokenizer of a model and the number of its positions."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"cannot read the model {path!r} ({error}); give an embedded model's name (`deltamem model list`), a "
            "Hugging Face id or a local folder with config.json and tokenizer.json"
        ) from error
    return tokenizer, int(config.max_position_embeddings)
