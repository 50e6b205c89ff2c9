# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Our routes of a real server against its own OpenAPI document: schemathesis sends what fits the document and what does
not, and looks at statuses, content types and bodies.

The server has an API key. It is sent with every request but those that are there to be turned away, and it is no part
of what is drawn. The stream never ends by itself, so it is asked with a bounded read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_schema_conformance,
    status_code_conformance,
)

from deltamem_vllm.doctor.asked import Asked
from deltamem_vllm.doctor.checks.server import check_server
from deltamem_vllm.evaluation.live_server import MODEL_NAME, LiveServer, serve

STREAM = "/deltamem/stream"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    positive_data_acceptance,
]
EXAMPLES = 25
KEY = "key-of-the-schemathesis-server"
BEARER = {"Authorization": f"Bearer {KEY}"}
FLAGS = ("--max-model-len", "4096", "--max-num-seqs", "4", "--block-size", "32", "--enforce-eager", "--api-key", KEY)


@pytest.fixture(scope="module")
def server(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("schemathesis") / "log"
    with serve(smollm2_path, log, deltamem={"mode": "always", "keep_ratio": 0.5}, flags=FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def document(server: LiveServer) -> dict[str, Any]:
    """The server's OpenAPI document with our routes only."""
    whole: dict[str, Any] = json.loads(server.get("/openapi.json"))
    return {**whole, "paths": {path: what for path, what in whole["paths"].items() if path.startswith("/deltamem")}}


def operations(document: dict[str, Any], url: str) -> list[Any]:
    """Every route of the document, for requests to ``url``. Whether the key is there is not to be drawn."""
    paths = {
        path: {method: {key: value for key, value in what.items() if key != "security"} for method, what in own.items()}
        for path, own in document["paths"].items()
    }
    schema = schemathesis.openapi.from_dict({**document, "paths": paths})
    schema.config.update(base_url=url)
    return [found.ok() for found in schema.get_all_operations()]


def explore(operation: Any, mode: GenerationMode, examples: int = EXAMPLES) -> list[int]:
    """Send drawn requests to one route; raises what schemathesis finds, else returns the statuses."""
    statuses: list[int] = []

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call(timeout=60, headers=BEARER)
        statuses.append(response.status_code)
        # A path that holds another route's, or none of ours, is answered by that one.
        case.validate_response(response, checks=[] if _is_elsewhere(case) else CHECKS)

    run()
    return statuses


def _is_elsewhere(case: Any) -> bool:
    return any(part in ("", ".", "..") for part in case.formatted_path.split("/")[1:])


def test_every_route_of_ours_is_described(document: dict[str, Any]) -> None:
    assert {"/deltamem/stats", "/deltamem/config"} <= document["paths"].keys()
    for path, methods in document["paths"].items():
        assert methods.keys() == {"get"}, f"{path} is read-only"
        assert "200" in methods["get"]["responses"]


def test_what_fits_the_document_is_answered_as_it_says(server: LiveServer, document: dict[str, Any]) -> None:
    looked_at = {}
    for operation in operations(document, server.url):
        if operation.path != STREAM:
            looked_at[operation.path] = explore(operation, GenerationMode.POSITIVE)
    assert looked_at["/deltamem/stats"] and set(looked_at["/deltamem/stats"]) == {200}
    assert set(looked_at["/deltamem/config"]) == {200}


def test_what_does_not_fit_is_refused_in_our_words(server: LiveServer, document: dict[str, Any]) -> None:
    for operation in operations(document, server.url):
        if operation.path != STREAM and (operation.query or operation.path_parameters):
            statuses = explore(operation, GenerationMode.NEGATIVE)
            assert 422 in statuses, f"{operation.path}: nothing wrong was sent"


def test_without_the_key_nothing_is_shown(server: LiveServer, document: dict[str, Any]) -> None:
    keyed = {path for path, methods in document["paths"].items() if "security" in methods["get"]}
    assert not keyed & {"/deltamem/stats", "/deltamem/config"}
    for operation in operations(document, server.url):
        case = operation.Case(path_parameters={name.name: "x" for name in operation.path_parameters})
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": KEY}):
            response = case.call(timeout=60, headers=headers)
            assert response.status_code == (401 if operation.path in keyed else 200)
            case.validate_response(response, checks=[status_code_conformance, response_schema_conformance])


def test_a_live_request_is_described_too(server: LiveServer, document: dict[str, Any]) -> None:
    """With nothing running most bodies are empty lists. The request is far longer than the looks at it take, so that
    none finds it ended; it goes with its connection.
    """
    if "/deltamem/requests" not in document["paths"]:
        pytest.skip("this server has no list of requests")
    body = {"model": MODEL_NAME, "prompt": [504] * 300, "max_tokens": 3700, "stream": True, "ignore_eos": True}
    by_path = {operation.path: operation for operation in operations(document, server.url)}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120, headers=BEARER) as running:
        assert running.status_code == 200
        lines = running.iter_lines()  # held: the connection closes with it
        next(lines)
        listed = by_path["/deltamem/requests"].Case(query={"limit": 1})
        response = listed.call(timeout=60, headers=BEARER)
        listed.validate_response(response, checks=CHECKS)
        (engine,) = response.json()["engines"]
        assert [row["prompt_tokens"] for row in engine["requests"]] == [300]
        layers = by_path["/deltamem/requests/{request_id}/layers"].Case(
            path_parameters={"request_id": engine["requests"][0]["id"]}, query={"engine": 0}
        )
        response = layers.call(timeout=60, headers=BEARER)
        layers.validate_response(response, checks=CHECKS)
        assert response.status_code == 200 and len(response.json()["hot_tokens"]) == 30


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(interval=st.one_of(st.floats(0.25, 60), st.sampled_from(["0", "-1", "61", "nan", "inf", "x", ""])))
def test_the_stream_begins_or_refuses(server: LiveServer, document: dict[str, Any], interval: float | str) -> None:
    if STREAM not in document["paths"]:
        pytest.skip("this server has no stream")
    url, query = f"{server.url}{STREAM}", {"interval": interval}
    with httpx.stream("GET", url, params=query, timeout=60, headers=BEARER) as answer:
        if isinstance(interval, str):
            assert answer.status_code == 422
            answer.read()
            assert answer.json().keys() == {"reason"}
            return
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: state"
        state = json.loads(next(line for line in lines if line.startswith("data:")).removeprefix("data:"))
    assert state.keys() == {"at", "stats", "requests"}
    assert state["stats"]["engines"] and state["requests"]["engines"]


def test_a_route_that_differs_from_its_description_is_found(server: LiveServer, document: dict[str, Any]) -> None:
    """The control: the same server against a document that promises something else."""
    other = json.loads(json.dumps(document))
    promised = other["paths"]["/deltamem/config"]["get"]["responses"]
    promised["200"]["content"]["application/json"]["schema"] = {"type": "object", "required": ["no_such_field"]}
    (config,) = [one for one in operations(other, server.url) if one.path == "/deltamem/config"]
    with pytest.raises(FailureGroup, match="no_such_field"):
        explore(config, GenerationMode.POSITIVE, examples=2)
    other = json.loads(json.dumps(document))
    del other["paths"]["/deltamem/config"]["get"]["responses"]["200"]
    other["paths"]["/deltamem/config"]["get"]["responses"]["418"] = {"description": "a teapot"}
    (config,) = [one for one in operations(other, server.url) if one.path == "/deltamem/config"]
    with pytest.raises(FailureGroup, match="418"):
        explore(config, GenerationMode.POSITIVE, examples=2)


def test_the_doctor_finds_the_server_well(server: LiveServer) -> None:
    findings = list(check_server(Asked(url=f"{server.url}/")))
    assert [finding.level for finding in findings] == ["ok"] * 3
