# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What users ask an OpenAI server, each call as a function of a client, and its answer as data that can be compared.

Every call is deterministic (greedy or seeded). Answers keep their statuses, fields and error shapes; only what is new
every time (ids, times) is left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
from openai import OpenAI

MODEL = "smollm2"
MAX_MODEL_LEN = 1024
FLAGS = (
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
    # Equal block sizes and exact numbers: what differs then is the policy's doing.
    *("--block-size", "32", "--dtype", "float32", "--enforce-eager"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)
"""Of every server that is compared."""
# vLLM compiles a few small functions whatever --enforce-eager says, which on a busy machine takes minutes.
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}

Answer = dict[str, Any]
Call = Callable[["Server"], Answer]

_NEW_EVERY_TIME = frozenset({"created", "created_at", "completed_at", "system_fingerprint", "request_id"})
_STORY = (
    "The lighthouse keeper of Arden wrote every evening into a green book. On the first of May she noted that the "
    "lamp had been lit at nine, that the wind came from the west, and that a ship with three masts had passed. "
)
LONG = _STORY * 12
"""About 600 tokens: long enough that a policy that evicts hard would show."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Server:
    """The clients of one server.

    Parameters
    ----------
    url
        Its root.
    xargs
        Sent as `vllm_xargs` with every generation.
    """

    def __init__(self, url: str, xargs: dict[str, Any] | None = None) -> None:
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        self.http = httpx.Client(base_url=url, timeout=300)
        self._extra = {} if xargs is None else {"extra_body": {"vllm_xargs": xargs}}

    def complete(self, prompt: str = "The capital of France is", **options: Any) -> Any:
        defaults: dict[str, Any] = {"model": MODEL, "max_tokens": 8, "temperature": 0}
        return self.client.completions.create(prompt=prompt, **{**defaults, **self._extra, **options})

    def chat(self, content: str = "Name three colours.", **options: Any) -> Any:
        defaults: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
        messages: Any = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(messages=messages, **{**defaults, **self._extra, **options})


def ask(call: Call, server: Server) -> Answer:
    """The answer, or the client's error, without what is new every time."""
    try:
        answer = {"status": 200, **call(server)}
    except openai.APIStatusError as error:
        answer = {"error": type(error).__name__, "status": error.status_code, "body": error.response.json()}
    return without_new(answer)


def without_new(value: Any) -> Any:
    """The same without ids and times. A model's id is its name and stays."""
    if isinstance(value, dict):
        named = value.get("object") == "model"
        return {
            key: without_new(inner)
            for key, inner in value.items()
            if key not in _NEW_EVERY_TIME and (named or key != "id")
        }
    return [without_new(inner) for inner in value] if isinstance(value, list) else value


def differences(first: Any, second: Any, tolerance: float = 1e-4, place: str = "") -> list[str]:
    """Where two answers differ: fields, lengths, kinds, values; numbers with a fraction by more than ``tolerance``."""
    if isinstance(first, dict) and isinstance(second, dict):
        found = [f"{place}.{key}: only in one" for key in first.keys() ^ second.keys()]
        for key in sorted(first.keys() & second.keys()):
            found += differences(first[key], second[key], tolerance, f"{place}.{key}")
        return found
    if isinstance(first, list) and isinstance(second, list):
        if len(first) != len(second):
            return [f"{place}: {len(first)} and {len(second)} entries"]
        return [
            line
            for index, pair in enumerate(zip(first, second, strict=True))
            for line in differences(*pair, tolerance, f"{place}[{index}]")
        ]
    if isinstance(first, float) and isinstance(second, float):
        same = abs(first - second) <= tolerance
    else:
        same = type(first) is type(second) and first == second
    return [] if same else [f"{place}: {first!r} and {second!r}"]


def _plain(answer: Any) -> Answer:
    dumped: Answer = answer.model_dump(mode="json")
    return dumped


def _raw(answer: httpx.Response) -> Answer:
    kind = answer.headers.get("content-type", "").partition(";")[0]
    return {"status": answer.status_code, "type": kind, "body": answer.json() if kind == "application/json" else ""}


def _streamed(chunks: Any) -> Answer:
    """The pieces of a stream put together: how many tokens a chunk has depends on the machine's load."""
    told = [_plain(chunk) for chunk in chunks]
    texts: dict[int, str] = {}
    reasons: dict[int, list[str]] = {}
    for chunk in told:
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            piece = choice.get("text") or delta.get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + piece
            if choice["finish_reason"]:
                reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
    return {
        "texts": [texts[index] for index in sorted(texts)],
        "reasons": [reasons.get(index, []) for index in sorted(texts)],
        "objects": sorted({chunk["object"] for chunk in told}),
        "fields": sorted({field for chunk in told for field in chunk}),
        "choice_fields": sorted({field for chunk in told for choice in chunk["choices"] for field in choice}),
        "roles": [role for chunk in told for c in chunk["choices"] if (role := (c.get("delta") or {}).get("role"))][:1],
        "usage": [chunk["usage"] for chunk in told if chunk.get("usage") and not chunk["choices"]],
        "several_chunks": len(told) > 2,
    }


def _cancelled(server: Server) -> Answer:
    stream = server.complete(LONG, max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    pieces = [next(iter(stream)) for _ in range(3)]
    stream.close()
    deadline = time.monotonic() + 60
    while (running := _running(server)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return {"read": len(pieces), "still_running": running, "then": _plain(server.complete())}


def _running(server: Server) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def _concurrent(server: Server) -> Answer:
    topics = ("bread", "rivers", "music", "winter", "chess", "honey", "trains", "glass")
    with ThreadPoolExecutor(len(topics)) as pool:
        answers = list(pool.map(lambda topic: server.complete(f"{_STORY} Here is a fact about {topic}:"), topics))
    return {"answers": [_plain(answer) for answer in answers]}


def _post(path: str, body: Any) -> Call:
    return lambda server: _raw(server.http.post(path, json=body))


def _detokenised(server: Server) -> Answer:
    tokens = server.http.post("/tokenize", json={"model": MODEL, "prompt": _STORY}).json()["tokens"]
    return {"tokens": tokens, **_raw(server.http.post("/detokenize", json={"model": MODEL, "tokens": tokens}))}


def _tool(server: Server) -> Answer:
    forced = {"type": "function", "function": {"name": "get_weather"}}
    answer = server.chat("Weather in Paris?", tools=[WEATHER], tool_choice=forced, max_tokens=64)
    return _plain(answer)


_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
_CONVERSATION: Any = [
    {"role": "system", "content": "You answer in one word."},
    {"role": "user", "content": "Which colour has the sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And grass?"},
]

GENERATIONS: dict[str, Call] = {
    "completion": lambda s: _plain(s.complete()),
    "completion of a long prompt": lambda s: _plain(s.complete(LONG, max_tokens=24, logprobs=1)),
    "completion with stop": lambda s: _plain(s.complete("1, 2, 3, 4,", max_tokens=24, stop=["8"])),
    "completion with n and a seed": lambda s: _plain(s.complete(n=3, temperature=0.8, seed=7)),
    "completion with a seed and top_p": lambda s: _plain(s.complete(temperature=1.0, top_p=0.5, seed=3, max_tokens=16)),
    "completion with log-probs": lambda s: _plain(s.complete(logprobs=3)),
    "completion with echo": lambda s: _plain(s.complete(echo=True)),
    "completion of several prompts": lambda s: _plain(s.complete(["One, two,", "Red, green,"])),
    "completion of token ids": lambda s: _plain(s.complete([504, 3575, 282, 4649, 314])),
    "completion of one token": lambda s: _plain(s.complete(max_tokens=1)),
    "completion with penalties": lambda s: _plain(
        s.complete("Again and again and", max_tokens=16, frequency_penalty=0.7, presence_penalty=0.3)
    ),
    "completion of more tokens than fit": lambda s: _plain(s.complete(max_tokens=MAX_MODEL_LEN)),
    "chat": lambda s: _plain(s.chat()),
    "chat of a long prompt": lambda s: _plain(s.chat(f"{LONG} When was the lamp lit?", max_tokens=24)),
    "chat of several turns": lambda s: _plain(
        s.client.chat.completions.create(model=MODEL, messages=_CONVERSATION, max_tokens=8, temperature=0)
    ),
    "chat with log-probs": lambda s: _plain(s.chat(logprobs=True, top_logprobs=4, max_tokens=6)),
    "chat with n and a seed": lambda s: _plain(s.chat(n=2, temperature=0.7, seed=11)),
    "chat with a JSON schema": lambda s: _plain(s.chat("Invent a person.", response_format=_SCHEMA, max_tokens=48)),
    "chat with a JSON object": lambda s: _plain(
        s.chat("Invent a person as JSON.", response_format={"type": "json_object"}, max_tokens=16)
    ),
    "chat with a forced tool": _tool,
    "streamed completion": lambda s: _streamed(s.complete(stream=True, max_tokens=16)),
    "streamed completion with usage": lambda s: _streamed(
        s.complete(stream=True, max_tokens=16, stream_options={"include_usage": True})
    ),
    "streamed chat": lambda s: _streamed(s.chat(stream=True, stream_options={"include_usage": True})),
    "streamed chat of a long prompt": lambda s: _streamed(s.chat(f"{LONG} And then?", stream=True, max_tokens=24)),
    "streamed completion with n": lambda s: _streamed(s.complete(stream=True, n=2, temperature=0.9, seed=5)),
    "concurrent completions": _concurrent,
    "a cancelled stream": _cancelled,
}
"""Calls that generate."""

OTHERS: dict[str, Call] = {
    "list of models": lambda s: _plain(s.client.models.list()),
    "one model": lambda s: _plain(s.client.models.retrieve(MODEL)),
    "unknown model asked for": lambda s: _plain(s.client.models.retrieve("nobody/nothing")),
    "tokenise": _post("/tokenize", {"model": MODEL, "prompt": _STORY}),
    "tokenise chat": _post("/tokenize", {"model": MODEL, "messages": _CONVERSATION}),
    "detokenise": _detokenised,
    "embeddings": lambda s: _plain(s.client.embeddings.create(model=MODEL, input="hello")),
    "unknown model": lambda s: _plain(s.complete(model="nobody/nothing")),
    "unknown model in a chat": lambda s: _plain(s.chat(model="nobody/nothing")),
    "prompt beyond the context": lambda s: _plain(s.complete(LONG * 3)),
    "chat beyond the context": lambda s: _plain(s.chat(LONG * 3)),
    "negative temperature": lambda s: _plain(s.complete(temperature=-1)),
    "temperature that is no number": lambda s: _plain(s.complete(temperature="hot")),
    "no tokens": lambda s: _plain(s.complete(max_tokens=0)),
    "top_p above one": lambda s: _plain(s.chat(top_p=1.5)),
    "too many log-probs": lambda s: _plain(s.complete(logprobs=1000)),
    "n of nought": lambda s: _plain(s.complete(n=0)),
    "impossible schema": lambda s: _plain(
        s.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}})
    ),
    "chat without messages": _post("/v1/chat/completions", {"model": MODEL}),
    "unknown role": _post("/v1/chat/completions", {"model": MODEL, "messages": [{"role": 5, "content": "x"}]}),
    "body that is no JSON": lambda s: _raw(
        s.http.post("/v1/completions", content=b"{not json", headers={"content-type": "application/json"})
    ),
    "body of another type": lambda s: _raw(
        s.http.post("/v1/completions", content=b"model=x", headers={"content-type": "text/plain"})
    ),
    "empty body": lambda s: _raw(s.http.post("/v1/completions")),
    "wrong method": lambda s: _raw(s.http.get("/v1/completions")),
    "unknown route": lambda s: _raw(s.http.get("/v1/nothing")),
    "version": lambda s: _raw(s.http.get("/version")),
    "health": lambda s: {"status": s.http.get("/health").status_code},
}
"""Calls that generate nothing: lists, tokenising, errors."""

CALLS: dict[str, Call] = {**GENERATIONS, **OTHERS}


def record(server: Server, names: tuple[str, ...] | None = None) -> dict[str, Answer]:
    """The answers of a server, in the order of `CALLS`."""
    return {name: ask(call, server) for name, call in CALLS.items() if names is None or name in names}


def openapi(server: Server) -> dict[str, Any]:
    """The server's paths."""
    paths: dict[str, Any] = json.loads(server.http.get("/openapi.json").text)["paths"]
    return paths
