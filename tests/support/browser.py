# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""A real headless Chromium with an empty profile, driven by Selenium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REQUIRED = "DELTAMEM_REQUIRE_BROWSER"


def find_browser() -> tuple[str, str]:
    """Paths of a browser and its driver; skips the test without them, or fails it where they are required."""
    browser = next((found for name in _BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser is not None and driver is not None:
        return browser, driver
    missing = "chromium" if browser is None else "chromedriver"
    reason = f"no {missing} on this machine (Debian: apt-get install chromium chromium-driver)"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason}, and {REQUIRED}=1 asks for one")
    pytest.skip(reason)


@contextmanager
def open_browser(profile: Path, width: int = 1360, height: int = 1000, *, dark: bool = False) -> Iterator[Any]:
    """Yield a Selenium driver; `profile` is an empty folder of its own."""
    from selenium import webdriver

    browser, path = find_browser()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    # As root, and in containers with a small /dev/shm, Chromium needs both of these.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(path))
    try:
        resize(driver, width, height)
        prefer(driver, dark=dark)
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int) -> None:
    """Size of the page itself; a window cannot be made as narrow as a phone."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )


def prefer(driver: Any, *, dark: bool) -> None:
    """What the page is told of the system's colours."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def console_errors(driver: Any) -> list[str]:
    """What the console has said since it was asked last, from warnings on."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def until(holds: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait until `holds` returns something true, and return it; the page may be drawn anew between two looks."""
    deadline, error = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if found := holds():
                return found
        except Exception as caught:  # an element that was just replaced; said below if it never comes right
            error = caught
        time.sleep(0.1)
    raise AssertionError(f"never came true within {seconds:g} s (last error: {error})")
