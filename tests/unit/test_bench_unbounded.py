# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Unbounded and conversation scenarios and compared outputs of a bench, with scripted engines and servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deltamem_vllm.evaluation.bench.engine import Outputs
from deltamem_vllm.evaluation.bench.kinds import ConversationScenario, UnboundedScenario
from deltamem_vllm.evaluation.bench.report import write_report
from deltamem_vllm.evaluation.bench.run import DECISIVE, Bench
from deltamem_vllm.evaluation.bench.runs import conversation, session
from deltamem_vllm.evaluation.bench.runs.conversation import make_messages, pool_usage
from deltamem_vllm.evaluation.bench.runs.throughput import compare
from deltamem_vllm.evaluation.bench.scenario import ScenarioError, parse_scenario
from deltamem_vllm.evaluation.child import ChildFailed
from deltamem_vllm.evaluation.machine import describe_code, describe_machine
from deltamem_vllm.evaluation.results import Results

CONDITIONS = {"model": "toy", "machine": describe_machine(), "code": describe_code(DECISIVE)}
REFUSAL = "To serve at least one request with the model's max seq len (3200), more is needed."

UNBOUNDED = {
    "kind": "unbounded",
    "name": "unb",
    "question": "Is there an end?",
    "pool_tokens": 330,
    "requests": [{"prompt_tokens": 100, "output_tokens": 1}, {"prompt_tokens": 3180, "output_tokens": 20}],
    "repeats": 2,
    "targets": [
        {"measure": "pools", "at_least": 8},
        {"measure": "peak_pool_usage", "at_most": 1},
        {"measure": "preemptions", "at_most": 0},
    ],
}
CONVERSATION = {
    "kind": "conversation",
    "name": "chat",
    "question": "Does it go on?",
    "turns": 6,
    "message_tokens": 20,
    "reply_tokens": 12,
    "pool_turns": 2,
    "policy": {"keep_tokens": 64},
    "repeats": 1,
    "targets": [{"measure": "answered", "at_least": 1}, {"measure": "peak_pool_usage", "at_most": 1}],
}
THROUGHPUT = {
    "kind": "throughput",
    "name": "same",
    "question": "Is it the same?",
    "pool_requests": 2,
    "traffic": {"requests": 2, "prompt_tokens": 40, "output_tokens": 3},
    "compare_outputs": True,
    "repeats": 1,
    "targets": [
        {"measure": "same_tokens", "at_least": 1},
        {"measure": "logprob_difference", "at_most": 0},
        {"measure": "compactions", "at_most": 0},
        {"measure": "preemptions", "at_most": 0},
    ],
}


def said(*tokens: int, logprobs: list[float] | None = None) -> Outputs:
    return {"token_ids": list(tokens), "logprobs": logprobs or [-1.0] * len(tokens)}


class ScriptedEngine:
    """Stock does not start on a pool that is too small; both say what `answers` has for their side."""

    answers: dict[str, list[Outputs]] = {}
    served: list[tuple[int, int]] = []

    def __init__(self, engine_args: dict[str, Any], log: Path, *, stock: bool, stepwise: bool) -> None:
        self.side = log.stem.rpartition("-")[2]
        self.facts = {"vocabulary": 1000, "start_s": 1.0, "policy": None if stock else {"keep_tokens": 64}}
        self.log = log
        self.fits = engine_args["max_model_len"] <= (engine_args["num_gpu_blocks_override"] - 1) * 32

    def ready(self) -> ScriptedEngine:
        if self.side == "stock" and not self.fits:
            self.log.parent.mkdir(exist_ok=True)
            self.log.write_text(f"(core) ERROR ValueError: {REFUSAL}\nRuntimeError: see above\n")
            raise ChildFailed("ended with status 1")
        return self

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def cpu_seconds(self) -> float:
        return 0.0

    def run(self, prompts: list[list[int]], output_tokens: int, **more: Any) -> dict[str, Any]:
        ScriptedEngine.served.append((len(prompts[0]), output_tokens))
        request = {"first_token_s": 1.0, "rest_s": 1.9, "output_tokens": output_tokens, "cached_tokens": 0}
        requests: list[dict[str, Any]] = [dict(request) for _ in prompts]
        if more:
            assert more == {"outputs": True}
            requests = [{**one, "outputs": o} for one, o in zip(requests, self.answers[self.side], strict=True)]
        return {
            "wall_s": 2.0,
            "cpu_s": 2.0,
            "requests": requests,
            "steps": 4,
            "max_running": 1,
            "mean_running": 1.0,
            "preemptions": 0,
            "peak_pool_usage": 0.5 if len(prompts[0]) < 330 else 0.9,
            "policy": {"compactions": 9} if len(prompts[0]) > 330 else {},
        }


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedEngine]:
    monkeypatch.setattr(ScriptedEngine, "answers", {})
    monkeypatch.setattr(ScriptedEngine, "served", [])
    monkeypatch.setattr(session, "Engine", ScriptedEngine)
    return ScriptedEngine


def report_of(tmp_path: Path, document: dict[str, Any]) -> str:
    scenario = parse_scenario(document, "x")
    bench = Bench("model", CONDITIONS, Results(tmp_path / "bench.jsonl"), tmp_path / "logs", lambda _: None)
    run = bench.run(scenario)
    write_report(tmp_path / "bench.md", Results(tmp_path / "bench.jsonl"), {run: scenario}, "deltamem bench")
    return (tmp_path / "bench.md").read_text()


# ---- unbounded --------------------------------------------------------------------------------------------


def test_requests_longer_than_the_pool_are_reported_with_what_stock_says(
    tmp_path: Path, scripted: type[ScriptedEngine]
) -> None:
    scenario = parse_scenario(UNBOUNDED, "x")
    assert isinstance(scenario, UnboundedScenario)
    assert (scenario.max_model_len, scenario.pool_blocks) == (3200, 11)
    text = report_of(tmp_path, UNBOUNDED)
    assert "| unb | 3200 tokens served, in pools | >= 8 | 10.000 | met |" in text
    assert "| unb | peak_pool_usage, largest | <= 1 | 0.900 | met |" in text
    assert "| unb | preemptions, largest | <= 0 | 0.000 | met |" in text
    assert "| 3180 | 20 | 10.0 | 9 | 1.00 | 100.0 | 9 |" in text
    assert "| 100 | 1 | 0.3 | 5 | 1.00 | - | 0 |" in text, "one token has no time per further one"
    assert REFUSAL in text
    scripted.served.clear()
    report_of(tmp_path, UNBOUNDED)
    assert scripted.served == [], "a finished run serves nothing"


def test_a_request_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(ScenarioError, match="listed twice"):
        parse_scenario({**UNBOUNDED, "requests": UNBOUNDED["requests"][:1] * 2}, "x")  # type: ignore[index]


# ---- compared outputs -------------------------------------------------------------------------------------


def test_outputs_are_compared_up_to_the_first_token_that_differs() -> None:
    same = compare([said(1, 2, 3)], [said(1, 2, 3)])
    assert same == {"same_tokens": 1.0, "logprob_difference": 0.0, "compared_tokens": 3}
    stock = [said(1, 2, 3), said(1, 2, 3, logprobs=[-1.0, -2.0, -3.0])]
    ours = [said(1, 2, 3), said(1, 9, 3, logprobs=[-1.5, -9.0, -9.0])]
    assert compare(stock, ours) == {"same_tokens": 0.5, "logprob_difference": 0.5, "compared_tokens": 4}


def test_same_outputs_are_reported_and_judged(tmp_path: Path, scripted: type[ScriptedEngine]) -> None:
    scripted.answers = {"stock": [said(1, 2, 3), said(4, 5, 6)], "deltamem": [said(1, 2, 3), said(4, 5, 7)]}
    text = report_of(tmp_path, THROUGHPUT)
    assert "| same | same_tokens | >= 1 | 0.500 | **not met** |" in text
    assert "| same | logprob_difference | <= 0 | 0.000 | met |" in text
    assert "| same | compactions of deltamem | <= 0 | 0.000 | met |" in text
    assert "| same | preemptions of deltamem | <= 0 | 0.000 | met |" in text
    assert "the same token ids in 50.0% of the requests" in text


def test_targets_on_outputs_need_them_compared() -> None:
    with pytest.raises(ScenarioError, match="names same_tokens, which needs compare_outputs: true"):
        parse_scenario({**THROUGHPUT, "compare_outputs": False}, "x")


# ---- conversation -----------------------------------------------------------------------------------------


def test_pool_and_longest_prompt_of_a_conversation() -> None:
    scenario = parse_scenario(CONVERSATION, "x")
    assert isinstance(scenario, ConversationScenario)
    assert scenario.turn_tokens == 20 + 12 + 16
    assert scenario.max_model_len == 64 + 6 * 48
    assert scenario.pool_blocks == 3 + 1


def test_messages_have_their_length_and_differ() -> None:
    scenario = parse_scenario(CONVERSATION, "x")
    assert isinstance(scenario, ConversationScenario)
    messages = make_messages(scenario, 0, lambda text: len(text.split()))
    assert [len(message.split()) for message in messages] == [20] * 6
    assert len(set(messages)) == 6
    assert messages != make_messages(scenario, 1, lambda text: len(text.split()))


def test_pool_usage_is_the_highest_of_a_servers_engines() -> None:
    text = "".join(f'vllm:kv_cache_usage_perc{{engine="{n}"}} {value}\n' for n, value in ((0, 0.25), (1, 0.75)))
    assert pool_usage(text) == 0.75
    assert pool_usage("") == 0.0


def test_stock_ends_where_it_refuses_and_deltamem_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    limits: dict[str, int] = {}

    @contextmanager
    def serve(model: str, log: Path, *, deltamem: object, flags: list[str], environment: object) -> Iterator[Any]:
        side = log.stem.rpartition("-")[2]
        assert environment == ({"VLLM_PLUGINS": ""} if side == "stock" else None)
        limits[side] = int(flags[flags.index("--max-model-len") + 1])
        yield SimpleNamespace(url=f"http://{side}", get=lambda path: 'vllm:kv_cache_usage_perc{engine="0"} 0.5\n')

    class Client:
        """Counts a token for each word and ten for the template, and refuses what is too long."""

        def __init__(self, *, base_url: str, **_: object) -> None:
            self._limit = limits[base_url.removeprefix("http://").removesuffix("/v1")]
            self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

        def _create(self, *, messages: list[dict[str, str]], max_tokens: int, **_: object) -> Any:
            tokens = 10 + sum(len(message["content"].split()) for message in messages)
            if tokens + max_tokens > self._limit:
                answer = httpx.Response(400, request=httpx.Request("POST", "http://x"))
                raise openai.BadRequestError("too long", response=answer, body=None)  # type: ignore[arg-type]
            choice = SimpleNamespace(message=SimpleNamespace(content=" ".join(["word"] * max_tokens)))
            usage = SimpleNamespace(prompt_tokens=tokens, completion_tokens=max_tokens)
            return SimpleNamespace(choices=[choice], usage=usage)

    monkeypatch.setattr(conversation, "serve", serve)
    monkeypatch.setattr(conversation, "_token_counter", lambda model: lambda text: len(text.split()))
    monkeypatch.setattr(openai, "OpenAI", Client)
    text = report_of(tmp_path, CONVERSATION)
    assert limits == {"stock": 3 * 32, "deltamem": 64 + 6 * 48}
    assert "| chat | answered, deltamem | >= 1 | 1.000 | met |" in text
    assert "| stock | 2 | 0% | HTTP 400: too long |" in text or "| stock | 2 | 50% | HTTP 400: too long |" in text
    assert "| deltamem | 6 |" in text
    assert "| 6 | 190 | - |" in text, "the last turn: ten tokens, six messages and five replies"
