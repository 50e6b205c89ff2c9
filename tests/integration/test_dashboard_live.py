# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The dashboard and `deltamem top` on a real vLLM server under load, the former in a real headless Chromium."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver.common.by import By

from deltamem_vllm.evaluation.live_server import MODEL_NAME, LiveServer, serve
from tests.support.browser import console_errors, find_browser, open_browser, resize, until
from tests.support.commands import run_command

CONFIG = {"mode": "always", "keep_ratio": 0.25, "min_tokens": 64}
FLAGS = ("--max-model-len", "2048", "--max-num-seqs", "4", "--max-num-batched-tokens", "256")
HOSTILE = '<img src=x onerror="document.title=1">'
KEY = "the-servers-key"
LAYERS, KV_HEADS = 30, 3  # of SmolLM2-135M


@pytest.fixture(scope="module")
def server(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    find_browser()
    log = tmp_path_factory.mktemp("server") / "log"
    flags = [*FLAGS, "--block-size", "32", "--num-gpu-blocks-override", "128", "--enforce-eager", "--api-key", KEY]
    environment = {"OMP_NUM_THREADS": "1"}
    with serve(smollm2_path, log, deltamem=CONFIG, flags=flags, environment=environment) as running:
        yield running


def _complete(server: LiveServer, name: str, prompt_tokens: int, max_tokens: int, **xargs: Any) -> httpx.Response:
    prompt = [(7 * place + 131 * len(name)) % 40_000 + 100 for place in range(prompt_tokens)]
    body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    headers = {"X-Request-Id": name, "Authorization": f"Bearer {KEY}"}
    answer = httpx.post(
        f"{server.url}/v1/completions", json={**body, "vllm_xargs": xargs}, headers=headers, timeout=300
    )
    return answer


@pytest.fixture
def load(server: LiveServer) -> Iterator[None]:
    """Three requests that follow each other without end, one with a name that would be markup."""
    stop = threading.Event()

    def repeat(name: str) -> None:
        while not stop.is_set():
            answer = _complete(server, name, 700, 160)
            assert answer.status_code == 200, answer.text

    with ThreadPoolExecutor(3) as clients:
        running = [clients.submit(repeat, name) for name in (HOSTILE, "second", "third")]
        try:
            yield
        finally:
            stop.set()
            for one in running:
                one.result()


def _until(holds: Callable[[], Any]) -> Any:
    return until(holds, 90)  # requests have to come and be compacted first


def _ask(server: LiveServer, path: str) -> Any:
    return httpx.get(f"{server.url}/deltamem/{path}", headers={"Authorization": f"Bearer {KEY}"}, timeout=60).json()


def _text(browser: Any, selector: str) -> str:
    return str(browser.find_element(By.CSS_SELECTOR, selector).text)


def test_the_page_shows_what_the_server_says_under_load(server: LiveServer, load: None, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile", dark=True) as browser:
        browser.get(f"{server.url}/deltamem/dashboard")
        _until(lambda: browser.find_element(By.ID, "key-dialog").is_displayed())
        # The refusal itself is the only thing that the console may have to say.
        assert all("401" in line for line in console_errors(browser))
        browser.find_element(By.ID, "key").send_keys(KEY)
        browser.find_element(By.CSS_SELECTOR, "#key-form [type=submit]").click()
        _until(lambda: _text(browser, "#state-words") == "Live")
        assert _text(browser, "#model") == MODEL_NAME

        _until(lambda: _seen_is_between_two_answers(server, browser))
        name = _open_a_compacted_request(server, browser)
        assert len(browser.find_elements(By.CSS_SELECTOR, ".heat-map td")) == LAYERS * KV_HEADS
        assert _text(browser, ".heat-id") == name
        assert not browser.find_elements(By.CSS_SELECTOR, "#requests img, #events img, #heat img")
        assert browser.title == f"{MODEL_NAME} · deltamem"
        # What stands there is only the newest: the hostile one comes round again.
        _until(lambda: HOSTILE in _text(browser, "#events"))
        resize(browser, 360, 800)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert "keep_ratio" in browser.find_element(By.ID, "policy").get_attribute("textContent")
        assert not [line for line in console_errors(browser) if not _says_that_a_request_ended(line)]


def _seen_is_between_two_answers(server: LiveServer, browser: Any) -> bool:
    """Whether a request's number in the page lies between what the server said before and after."""

    def seen() -> dict[str, int]:
        (engine,) = _ask(server, "requests")["engines"]
        return {row["id"]: row["logical_tokens"] for row in engine["requests"]}

    before = seen()
    script = """return [...document.querySelectorAll('.requests tbody tr')].map((row) => [
        row.querySelector('.id').textContent, Number(row.querySelector('.seen').textContent.replaceAll(',', ''))])"""
    time.sleep(1.2)  # longer than one interval: what is shown then is newer than the first answer
    shown = dict(browser.execute_script(script))
    time.sleep(0.2)
    after = seen()
    both = before.keys() & shown.keys() & after.keys()
    assert all(before[name] <= shown[name] <= after[name] for name in both), (before, shown, after)
    return any(before[name] < after[name] for name in both)


def _says_that_a_request_ended(line: str) -> bool:
    """Whether a line of the console is the 404 of a request that ended after it was listed.

    The list comes once a second; the page says in words that the request is gone, and a browser writes every refused
    answer into its console, whether the page handles it or not.
    """
    return re.search(r"/deltamem/requests/[^/ ]+/layers\?engine=0 - .* status of 404 ", line) is not None


def _open_a_compacted_request(server: LiveServer, browser: Any) -> str:
    """Click on a request that was compacted and runs on until its map stands there; its id."""

    def opened() -> str | None:
        (engine,) = _ask(server, "requests")["engines"]
        found = [row["id"] for row in engine["requests"] if row["status"] == "running" and row["compactions"]]
        for button in browser.find_elements(By.CSS_SELECTOR, ".requests tbody .id button"):
            if button.text in found:
                name = str(button.text)
                button.click()
                # One that ends before it is asked has no map: then the next one is opened.
                until(lambda: browser.find_elements(By.CSS_SELECTOR, ".heat-map td"), 10)
                return name
        return None

    return str(_until(opened))


def test_refusals_and_totals_are_the_same_in_page_and_route(server: LiveServer, tmp_path: Path) -> None:
    refused = _complete(server, "refused", 100, 4, deltamem_keep_ratio=1.5)
    assert refused.status_code == 400
    _until(lambda: not _ask(server, "requests")["engines"][0]["requests"])
    stats = _ask(server, "stats")
    with open_browser(tmp_path / "profile") as browser:
        # The stand-alone dashboard: the browser never sees the server's key.
        command = [str(Path(sys.executable).with_name("deltamem")), "dashboard", "--url", server.url, "--port", "0"]
        process = subprocess.Popen([*command, "--server-key", KEY], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            place = process.stderr.readline().split()[2]
            browser.get(f"{place}deltamem/dashboard")
            _until(lambda: _text(browser, "#state-words") == "Live")
            total = sum(stats["refused"].values())
            skipped = sum(stats["engines"][0]["totals"]["counters"]["compactions_skipped"].values())
            assert total >= 1
            _until(lambda: _text(browser, '[data-number="trouble"]') == f"{total} · {skipped}")
            assert _text(browser, '[data-number="requests"]') == "0 running · 0 waiting"
            assert "No live requests" in _text(browser, "#requests")
            assert "bad option" in _text(browser, "#events")
            assert KEY not in browser.page_source
            assert not console_errors(browser)
        finally:
            process.terminate()
            process.wait(timeout=20)


def _top(server: LiveServer, *further: str) -> subprocess.CompletedProcess[str]:
    return run_command([Path(sys.executable).with_name("deltamem"), "top", "--once", "--url", server.url, *further])


def test_top_shows_the_server_under_load(server: LiveServer, load: None) -> None:
    _until(lambda: _ask(server, "requests")["engines"][0]["requests"])

    def shown(*further: str) -> str:
        done = _top(server, "--api-key", KEY, *further)
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Between two requests of its clients a server may have none for a moment.
    frame = _until(lambda: text if "cmpl-" in (text := shown()) else None)
    assert f"{MODEL_NAME} at" in frame and "pool " in frame
    _until(lambda: json.loads(shown("--json"))["requests"]["engines"][0]["total"] >= 1)


def test_top_says_that_a_real_server_wants_its_key(server: LiveServer) -> None:
    done = _top(server)
    assert (done.returncode, done.stdout) == (1, "") and "asks for its API key (HTTP 401)" in done.stderr
