# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A chat that outgrows the pool, through the OpenAI client against real servers.

Every turn sends the whole history, as clients do. Stock vLLM cannot be told of requests longer than its pool, so its
server is started for as long ones as that holds, and its part ends with the first turn it refuses.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

from deltamem_vllm.evaluation.bench.kinds import ConversationScenario
from deltamem_vllm.evaluation.bench.runs.serving import server_flags
from deltamem_vllm.evaluation.bench.runs.session import SIDES, STOCK, Session, both_policies
from deltamem_vllm.evaluation.live_server import MODEL_NAME, LiveServer, serve
from deltamem_vllm.evaluation.machine import Moment

# Seconds that one turn may take.
_TURN_S = 900.0
_POLL_S = 0.1
_WORDS = (
    *(
        "river",
        "stone",
        "garden",
        "letter",
        "window",
        "bread",
        "morning",
        "paper",
        "engine",
        "yellow",
        "quiet",
        "north",
    ),
    *(
        "table",
        "music",
        "winter",
        "market",
        "silver",
        "bridge",
        "simple",
        "forest",
        "number",
        "school",
        "summer",
        "road",
    ),
)


def measure(session: Session, scenario: ConversationScenario) -> None:
    """Hold the conversations that are missing."""
    missing = [
        (side, repeat) for repeat in range(scenario.repeats) for side in SIDES if session.get(side, repeat) is None
    ]
    session.say(f"{scenario.name}: {len(missing)} conversations to hold")
    if not missing:
        return
    # The servers change the folder they start in.
    model = str(Path(session.model).resolve()) if Path(session.model).is_dir() else session.model
    with _servers(session, scenario, model, sorted({side for side, _ in missing})) as servers:
        count = _token_counter(model)
        for side, repeat in missing:
            messages = make_messages(scenario, repeat, count)
            session.add(_talk(session, scenario, servers[side], side, messages), side, repeat)


@contextmanager
def _servers(
    session: Session, scenario: ConversationScenario, model: str, sides: list[str]
) -> Iterator[dict[str, LiveServer]]:
    logs = session.logs.resolve()
    logs.mkdir(parents=True, exist_ok=True)
    policies = both_policies(scenario)
    with ExitStack() as stack:
        servers = {}
        for side in sides:
            flags = server_flags(scenario)
            if side == STOCK:
                pool_tokens = (scenario.pool_blocks - 1) * scenario.engine.block_size
                at = flags.index("--max-model-len") + 1
                flags[at] = str(min(int(flags[at]), pool_tokens))
            session.say(f"{scenario.name}: starting the {side} server")
            servers[side] = stack.enter_context(
                serve(
                    model,
                    logs / f"{scenario.name}-{side}.log",
                    deltamem=policies[side],
                    flags=flags,
                    environment={"VLLM_PLUGINS": ""} if side == STOCK else None,
                )
            )
            session.add({"flags": " ".join(flags), "policy": policies[side]}, "engine", side)
        yield servers


def _token_counter(model: str) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def make_messages(scenario: ConversationScenario, repeat: int, count: Callable[[str], int]) -> list[str]:
    """A user's message for each turn, of `message_tokens` tokens or one or two less; ``count`` counts them."""
    draw = Random(f"{scenario.seed}/{scenario.name}/{repeat}")
    messages = []
    for turn in range(scenario.turns):
        text = f"Turn {turn + 1}."
        while count(longer := f"{text} {draw.choice(_WORDS)}") <= scenario.message_tokens:
            text = longer
        messages.append(text)
    return messages


def _talk(
    session: Session, scenario: ConversationScenario, server: LiveServer, side: str, messages: list[str]
) -> dict[str, Any]:
    """One conversation, up to its last turn or the first one that is not answered."""
    from openai import APIStatusError, OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=_TURN_S, max_retries=0)
    history: list[Any] = []
    turns: list[dict[str, Any]] = []
    error = ""
    before = Moment.now()
    for turn, message in enumerate(messages, 1):
        history.append({"role": "user", "content": message})
        began = time.perf_counter()
        with _Watch(server) as watch:
            try:
                answer = client.chat.completions.create(
                    model=MODEL_NAME,
                    messages=history,
                    temperature=0,
                    max_tokens=scenario.reply_tokens,
                    extra_body={"ignore_eos": True},
                )
            except APIStatusError as refused:
                error = f"HTTP {refused.status_code}: {refused.message}"
                session.say(f"{scenario.name}: {side} does not answer turn {turn}: {error}")
                break
        seconds = time.perf_counter() - began
        assert answer.usage is not None, "vLLM counts tokens"
        history.append({"role": "assistant", "content": answer.choices[0].message.content})
        turns.append(
            {
                "prompt_tokens": answer.usage.prompt_tokens,
                "output_tokens": answer.usage.completion_tokens,
                "seconds": seconds,
                "peak_pool_usage": watch.highest,
            }
        )
        session.say(
            f"{scenario.name}: {side}, turn {turn}: {answer.usage.prompt_tokens} prompt tokens, {seconds:.1f} s, "
            f"{watch.highest:.0%} of the pool at most"
        )
    after = Moment.now()
    return {
        "turns": turns,
        "answered": len(turns) / scenario.turns,
        "error": error,
        "peak_pool_usage": max((turn["peak_pool_usage"] for turn in turns), default=0.0),
        "load_before": before.load,
        "load": after.load,
    }


class _Watch:
    """Looks at the pool of a server for the length of a `with` block.

    Attributes
    ----------
    highest: largest share of the pool in use that was seen.
    """

    def __init__(self, server: LiveServer) -> None:
        self.highest = 0.0
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_POLL_S):
            try:
                metrics = self._server.get("/metrics")
            except OSError:  # too busy to answer; the next look may succeed
                continue
            self.highest = max(self.highest, pool_usage(metrics))


def pool_usage(metrics: str) -> float:
    """The share of the KV pool in use, from a server's `/metrics`."""
    from prometheus_client.parser import text_string_to_metric_families

    return max(
        (
            sample.value
            for family in text_string_to_metric_families(metrics)
            for sample in family.samples
            if sample.name == "vllm:kv_cache_usage_perc"
        ),
        default=0.0,
    )
