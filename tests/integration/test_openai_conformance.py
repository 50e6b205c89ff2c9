# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""With room in the pool, a server with the policy answers the OpenAI client field by field as stock vLLM does.

One server after the other answers the same calls; the stock one runs as if no plugin were installed. The policy's
server has its defaults: mode `pressure`, which with so much room evicts nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from deltamem_vllm.evaluation.live_server import LiveServer, serve
from tests.support.openai_calls import (
    CALLS,
    ENVIRONMENT,
    FLAGS,
    GENERATIONS,
    Answer,
    Server,
    differences,
    openapi,
    record,
)

HARD = {"deltamem_mode": "always", "deltamem_keep_tokens": 32, "deltamem_min_tokens": 64}
"""What a request asks for to be evicted hard: the comparison must then fail."""

NO_PLUGIN = {"VLLM_PLUGINS": ""}

# Two servers start and answer everything inside the first test's fixtures.
pytestmark = pytest.mark.timeout(1800)


@dataclass
class Recorded:
    """What a server answered."""

    answers: dict[str, Answer]
    paths: dict[str, Any]


@pytest.fixture(scope="module")
def stock(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    log = tmp_path_factory.mktemp("stock") / "log"
    with serve(smollm2_path, log, deltamem=None, flags=FLAGS, environment=ENVIRONMENT | NO_PLUGIN) as running:
        server = Server(running.url)
        return Recorded(record(server), openapi(server))


@pytest.fixture(scope="module")
def running(stock: Recorded, smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    # After the stock server has ended: two at once would need twice the memory.
    log = tmp_path_factory.mktemp("policy") / "log"
    with serve(smollm2_path, log, deltamem={}, flags=FLAGS, environment=ENVIRONMENT) as server:
        yield server


@pytest.fixture(scope="module")
def policy(running: LiveServer) -> Recorded:
    server = Server(running.url)
    return Recorded(record(server), openapi(server))


@pytest.mark.parametrize("name", CALLS)
def test_the_answer_is_that_of_stock(name: str, stock: Recorded, policy: Recorded) -> None:
    assert differences(stock.answers[name], policy.answers[name]) == []


def test_the_calls_do_what_they_are_called(stock: Recorded) -> None:
    """An error on both sides would be equal, too."""
    statuses = {name: answer["status"] for name, answer in stock.answers.items()}
    assert {name for name in GENERATIONS if statuses[name] != 200} == set()
    refused = {
        "unknown model": 404,
        "unknown model in a chat": 404,
        "unknown model asked for": 404,
        "prompt beyond the context": 400,
        "chat beyond the context": 400,
        "negative temperature": 400,
        "temperature that is no number": 400,
        "top_p above one": 400,
        "too many log-probs": 400,
        "no tokens": 400,
        "impossible schema": 400,
        "body that is no JSON": 400,
        "body of another type": 400,
        "chat without messages": 400,
        "wrong method": 405,
        "unknown route": 404,
    }
    assert {name: statuses[name] for name in refused} == refused
    assert stock.answers["embeddings"]["status"] >= 400
    person = json.loads(stock.answers["chat with a JSON schema"]["choices"][0]["message"]["content"])
    assert person.keys() == {"name", "age"}
    called = stock.answers["chat with a forced tool"]["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in called] == ["get_weather"]
    assert len(stock.answers["completion with n and a seed"]["choices"]) == 3
    assert stock.answers["completion with stop"]["choices"][0]["stop_reason"] == "8"
    assert stock.answers["completion with echo"]["choices"][0]["text"].startswith("The capital of France is")
    assert stock.answers["streamed completion with usage"]["usage"][0]["completion_tokens"] == 16
    assert stock.answers["streamed completion"]["several_chunks"]
    assert stock.answers["a cancelled stream"]["still_running"] == 0


def test_the_policy_ran_and_had_room(running: LiveServer, policy: Recorded) -> None:
    assert policy.answers
    assert json.loads(running.get("/deltamem/config"))["config"]["mode"] == "pressure"


def test_the_servers_routes_are_stocks_and_ours(stock: Recorded, policy: Recorded) -> None:
    assert {path for path in policy.paths if path not in stock.paths} == {
        path for path in policy.paths if path.startswith("/deltamem/")
    }
    assert differences(stock.paths, {path: policy.paths[path] for path in stock.paths}) == []


def test_an_evicting_server_is_told_apart(stock: Recorded, running: LiveServer, policy: Recorded) -> None:
    """The control: requests that evict hard must differ, and only where something was there to evict."""
    before = running.stats()["totals"]["counters"]["compactions"]
    assert before == 0, "the recording itself was to have room"
    long = tuple(name for name in GENERATIONS if "long prompt" in name)
    short = ("completion", "chat")
    evicted = record(Server(running.url, xargs=HARD), (*long, *short))
    assert running.stats()["totals"]["counters"]["compactions"] >= len(long)
    for name in long:
        assert differences(stock.answers[name], evicted[name]), f"{name}: eviction went unnoticed"
    for name in short:
        assert differences(stock.answers[name], evicted[name]) == []


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"status": 200, "body": {"text": "a", "usage": {"total": 3}}}, ".body.usage.total: 2 and 3"),
        ({"status": 400, "body": {"text": "a", "usage": {"total": 2}}}, ".status: 200 and 400"),
        ({"status": 200, "body": {"text": "a"}}, ".body.usage: only in one"),
        ({"status": 200, "body": {"text": None, "usage": {"total": 2}}}, ".body.text: 'a' and None"),
    ],
)
def test_a_difference_is_found(other: Answer, told: str) -> None:
    same = {"status": 200, "body": {"text": "a", "usage": {"total": 2}}}
    assert differences(same, json.loads(json.dumps(same))) == []
    assert differences(same, other) == [told]


def test_numbers_may_differ_in_the_last_places_only() -> None:
    assert differences({"logprob": -1.0}, {"logprob": -1.00001}) == []
    assert differences({"logprob": -1.0}, {"logprob": -1.001}) == [".logprob: -1.0 and -1.001"]
    assert differences([1], [1.0]) == ["[0]: 1 and 1.0"]
