# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Take the pictures of docs/guides/dashboard.md: a real server under a real load, in a real browser.

    .venv/bin/python scripts/dashboard_pictures.py --seconds 300

Needs Chromium with its driver and Selenium (requirements/dev.txt). Writes dashboard-*.png into docs/pictures and prints
what `deltamem top` shows; look at them before you commit them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from deltamem_vllm.evaluation.live_server import MODEL_NAME, exit_on_sigterm, serve
from deltamem_vllm.models.catalog import resolve_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind everything else, and in this process only: for the tests' browser
from tests.support.browser import open_browser, prefer, resize  # noqa: E402

POOL_BLOCKS, CLIENTS = 64, 8
FLAGS = ("--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--block-size", "32")
CONFIG = {"keep_ratio": 0.15, "min_tokens": 128, "interval": 64}
MOST_BYTES = 250_000


def main() -> None:
    """Serve, load, look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="how long the load runs before the first picture")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="where to write them")
    parser.add_argument("--port", type=int, default=0, help="of the server; 0 takes a free one")
    args = parser.parse_args()
    exit_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        flags = [*FLAGS, "--num-gpu-blocks-override", str(POOL_BLOCKS), "--enforce-eager"]
        model = resolve_model("smollm2")
        with serve(model, folder / "log", deltamem=CONFIG, flags=flags, port=args.port, report=print) as server:
            stop = threading.Event()
            clients = [threading.Thread(target=_client, args=(server.url, n, stop)) for n in range(CLIENTS)]
            for client in clients:
                client.start()
            try:
                _take(server.url, folder, args.out, args.seconds)
            finally:
                stop.set()
                for client in clients:
                    client.join()
    for path in sorted(args.out.glob("dashboard-*.png")):
        # 256 colours are enough for a page of flat ones, and take a third of the bytes.
        Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path}: {path.stat().st_size} bytes")
        if path.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{path} has more than {MOST_BYTES} bytes")


def _client(url: str, number: int, stop: threading.Event) -> None:
    draw = random.Random(number)
    with httpx.Client(timeout=600) as http:
        for turn in range(10_000):
            if stop.is_set():
                return
            prompt = [draw.randrange(100, 40_000) for _ in range(draw.randrange(200, 900))]
            body: dict[str, Any] = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": draw.randrange(40, 180)}
            body |= {"ignore_eos": True, "temperature": 0}
            if number == 0 and turn % 3 == 1:
                body["vllm_xargs"] = {"deltamem_keep_ratio": 1.5}  # refused, and shown as such
            with http.stream(
                "POST",
                f"{url}/v1/completions",
                json={**body, "stream": True},
                headers={"X-Request-Id": f"chat-{number}-turn-{turn}"},
            ) as answer:
                for _ in answer.iter_lines():
                    if stop.is_set():
                        return


def _take(url: str, folder: Path, out: Path, seconds: float) -> None:
    from selenium.webdriver.common.by import By

    with open_browser(folder / "profile", 1440, 1240) as driver:
        driver.get(f"{url}/deltamem/dashboard")
        time.sleep(seconds)
        _open_heat_map(driver, By)
        driver.save_screenshot(str(out / "dashboard-light.png"))
        prefer(driver, dark=True)
        time.sleep(2)
        driver.save_screenshot(str(out / "dashboard-dark.png"))
        prefer(driver, dark=False)
        time.sleep(1)
        driver.find_element(By.ID, "heat").screenshot(str(out / "dashboard-heat-map.png"))
        resize(driver, 360, 1420)
        driver.execute_script("scrollTo(0, 0)")
        time.sleep(2)
        driver.save_screenshot(str(out / "dashboard-phone.png"))
    command = [str(Path(sys.executable).with_name("deltamem")), "top", "--once", "--url", url]
    print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _open_heat_map(driver: Any, by: Any) -> None:
    """Open the request that keeps least of those that hold several pages: there is most to see."""
    script = "return fetch('requests').then((answer) => answer.json()).then((told) => JSON.stringify(told))"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        told = json.loads(driver.execute_script(script))
        rows = [row for row in told["engines"][0]["requests"] if row["compactions"] and row["blocks"] >= 5]
        chosen = min(rows, key=lambda row: row["kept_share"])["id"] if rows else None
        for button in driver.find_elements(by.CSS_SELECTOR, ".requests tbody .id button"):
            if button.text == chosen:
                button.click()
                break
        time.sleep(1)
        if driver.find_elements(by.CSS_SELECTOR, ".heat-map td"):
            return
    raise SystemExit("the heat map did not open: no request was compacted, or the workers did not answer")


if __name__ == "__main__":
    main()
