# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The dashboard in a real headless Chromium, over servers whose numbers and failures the tests decide."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from deltamem_vllm.server.dashboard.app import create_dashboard_app
from deltamem_vllm.watching.address import Address
from tests.support.browser import console_errors, find_browser, open_browser, prefer, resize, until
from tests.support.watched_server import HOSTILE_ID, KV_HEADS, LAYERS, MadeUpEngines, made_up_app, on_a_port

CLOSED = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    find_browser()
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def engines() -> MadeUpEngines:
    return MadeUpEngines(2)


@pytest.fixture
def page(browser: Any, engines: MadeUpEngines) -> Iterator[Any]:
    """The page inside a server, live; a new server has a new port, so storage of the tests before is out of reach."""
    resize(browser, 1360, 1000)
    prefer(browser, dark=False)
    with on_a_port(made_up_app(engines)) as url:
        console_errors(browser)
        browser.get(f"{url}/deltamem/dashboard")
        until(lambda: _text(browser, "#state-words") == "Live" and _rows(browser))
        yield browser
        browser.get("about:blank")


def _one(browser: Any, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def _all(browser: Any, selector: str) -> list[Any]:
    return list(browser.find_elements(By.CSS_SELECTOR, selector))


def _text(browser: Any, selector: str) -> str:
    return str(_one(browser, selector).text)


def _rows(browser: Any) -> list[str]:
    return [cell.text for cell in _all(browser, ".requests tbody .id button")]


def _number(browser: Any, name: str) -> str:
    return _text(browser, f'[data-number="{name}"]')


def _width(browser: Any) -> int:
    return int(browser.execute_script("return document.documentElement.scrollWidth"))


def test_the_numbers_are_those_of_the_server(page: Any) -> None:
    assert _text(page, "#model") == "made-up"
    assert _number(page, "pool") == "11% of 720 MiB"
    assert _number(page, "tokens") == "10.4K → 3.5K"
    assert _number(page, "saved") == "152 MiB"
    assert _number(page, "requests") == "6 running · 8 waiting"
    assert _number(page, "trouble") == "1 · 4"
    assert "hot 63.7 MiB" in _text(page, "#pool-chart .legend") and "pool 720 MiB" in _text(page, "#pool-chart .legend")
    events = _text(page, "#events")
    assert "refused: bad option" in events and "deltamem_keep_ratio: got 1.5" in events
    assert "0.25default 0.1" in _text(page, "#policy").replace(" ", "").replace("default", "default ").replace("\n", "")
    assert not console_errors(page)


def test_one_engine_can_be_chosen_and_is_part_of_the_address(page: Any) -> None:
    _one(page, "#engine option[value='1']").click()
    until(lambda: _number(page, "requests") == "3 running · 4 waiting")
    assert len(_rows(page)) == 3
    assert page.current_url.endswith("#engine=1")


def test_a_hostile_request_id_is_text(page: Any) -> None:
    assert HOSTILE_ID.replace("\x1b", "") in [text.replace("\x1b", "") for text in _rows(page)]
    assert not _all(page, "#requests img, #events img")
    assert page.title == "made-up · deltamem"


def test_the_table_is_sorted_by_its_heads_and_keeps_the_focus(page: Any) -> None:
    head = next(one for one in _all(page, ".requests thead button") if one.text == "Seen")
    head.click()
    until(lambda: _rows(page)[0] == "cmpl-large")
    assert head.find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"
    head.click()
    until(lambda: _rows(page)[0] == "cmpl-new")
    _all(page, ".requests tbody .id button")[2].send_keys("")  # focus
    focused = page.switch_to.active_element.text
    time.sleep(2.5)  # two states later
    assert page.switch_to.active_element.text == focused


def test_the_heat_map_shows_every_layer_and_head_with_numbers_for_mouse_and_keyboard(page: Any) -> None:
    next(one for one in _all(page, ".requests tbody .id button") if one.text == "cmpl-large").click()
    cells = until(lambda: _all(page, ".heat-map td"))
    assert len(cells) == LAYERS * KV_HEADS
    assert [one.get_attribute("textContent") for one in _all(page, ".heat-map tbody th")] == [
        "head 0",
        "head 1",
        "head 2",
    ]
    cells[0].send_keys(Keys.ARROW_RIGHT)
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    until(lambda: _text(page, ".heat-readout").startswith("Layer 1, head 1: "))
    before = {one.value_of_css_property("background-color") for one in _all(page, ".heat-map td")}
    assert len(before) > 10, "cells of different worth have different colours"
    _one(page, ".choice input[value=cold]").find_element(By.XPATH, "..").click()
    after = {one.value_of_css_property("background-color") for one in _all(page, ".heat-map td")}
    assert before != after
    most = max(float(one.get_attribute("data-value")) for one in _all(page, ".heat-map td"))
    assert _text(page, ".heat-legend").startswith("0") and f"{most:,.0f} tokens" in _text(page, ".heat-legend")
    assert not console_errors(page)


def test_a_request_that_ended_keeps_its_map_and_says_so(page: Any, engines: MadeUpEngines) -> None:
    next(one for one in _all(page, ".requests tbody .id button") if one.text == "cmpl-large").click()
    until(lambda: _all(page, ".heat-map td"))
    engines.rows = engines.rows[1:]
    until(lambda: "not among the live ones" in _text(page, "#heat-body"))
    assert _all(page, ".heat-map td")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_theme_follows_the_system_until_the_button_says_otherwise(page: Any, dark: bool) -> None:
    def is_dark() -> bool:
        colour = _one(page, "body").value_of_css_property("background-color")
        return sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) < 200

    prefer(page, dark=dark)
    until(lambda: is_dark() is dark)
    button = _one(page, "#theme")
    button.click()
    assert (button.text, is_dark()) == ("Theme: light", False)
    button.click()
    assert (button.text, is_dark()) == ("Theme: dark", True)
    page.refresh()
    until(lambda: _text(page, "#theme") == "Theme: dark")
    assert is_dark()
    assert not console_errors(page)


@pytest.mark.parametrize("width", [320, 360, 768, 1024, 1920])
def test_no_width_scrolls_sideways(page: Any, width: int) -> None:
    resize(page, width, 800)
    _all(page, ".requests tbody .id button")[0].click()
    until(lambda: _all(page, ".heat-map td"))
    assert _width(page) <= width
    assert _one(page, ".requests tbody .id button").is_displayed()


def test_a_broken_server_is_said_and_old_numbers_look_old(page: Any, engines: MadeUpEngines) -> None:
    engines.down = "engine 0 is dead"
    until(lambda: _text(page, "#state-words") == "No numbers")
    assert _text(page, "#problem") == "engine 0 is dead"
    until(lambda: _one(page, "body").get_attribute("data-stale") == "yes")
    assert "numbers are" in _text(page, "#state-detail")
    engines.down = None
    until(lambda: _text(page, "#state-words") == "Live")
    assert not _one(page, "#problem").is_displayed()
    assert _one(page, "body").get_attribute("data-stale") == "no"


def test_a_server_that_went_away_is_tried_again_until_it_is_back(browser: Any) -> None:
    resize(browser, 1360, 1000)
    with on_a_port(made_up_app(MadeUpEngines())) as url:
        browser.get(f"{url}/deltamem/dashboard")
        until(lambda: _text(browser, "#state-words") == "Live")
    until(lambda: _text(browser, "#state-words") == "Reconnecting" and "next try in" in _text(browser, "#state-detail"))
    with on_a_port(made_up_app(MadeUpEngines()), int(url.rpartition(":")[2])):
        until(lambda: _text(browser, "#state-words") == "Live")
        browser.get("about:blank")


def test_the_key_is_asked_for_and_kept_in_this_tab_only(browser: Any) -> None:
    with on_a_port(made_up_app(MadeUpEngines(), key="right")) as url:
        browser.get(f"{url}/deltamem/dashboard")
        until(lambda: _one(browser, "#key-dialog").is_displayed())
        assert "API key" in _text(browser, "#key-reason")
        _one(browser, "#key").send_keys("wrong" + Keys.ENTER)
        until(lambda: "not the right one" in _text(browser, "#key-reason"))
        assert _text(browser, "#state-words") == "Key needed"
        _one(browser, "#key").send_keys("right" + Keys.ENTER)
        until(lambda: _text(browser, "#state-words") == "Live" and not _one(browser, "#key-dialog").is_displayed())
        assert browser.execute_script("return JSON.stringify(localStorage)").find("right") == -1
        assert browser.execute_script("return sessionStorage.getItem('deltamem-key')") == "right"
        _one(browser, "#key-forget").click()
        until(lambda: _text(browser, "#state-words") == "Key needed")
        assert browser.execute_script("return sessionStorage.getItem('deltamem-key')") is None
        browser.get("about:blank")


def test_pause_stops_the_numbers_and_says_so(page: Any, engines: MadeUpEngines) -> None:
    _one(page, "#pause").click()
    until(lambda: _text(page, "#state-words") == "Paused")
    engines.rows = engines.rows[:1]
    time.sleep(2.5)
    assert _number(page, "requests").startswith("6 running")
    _one(page, "#pause").click()
    until(lambda: _number(page, "requests").startswith("2 running"))


def test_several_servers_stand_side_by_side_and_a_dead_one_hurts_none(browser: Any) -> None:
    resize(browser, 1360, 1000)
    with on_a_port(made_up_app(MadeUpEngines(), key="k")) as one, on_a_port(made_up_app(MadeUpEngines(2))) as two:
        addresses = [Address("first", one, "k"), Address("dead", CLOSED), Address("second", two)]
        with on_a_port(create_dashboard_app(addresses, interval=0.5)) as url:
            console_errors(browser)
            browser.get(f"{url}/deltamem/dashboard")
            until(lambda: [card.get_attribute("data-status") for card in _cards(browser)] == ["live", "down", "live"])
            until(lambda: _number(browser, "requests") == "3 running · 4 waiting")
            assert "cannot be reached" in _cards(browser)[1].text
            _cards(browser)[2].click()
            until(lambda: _number(browser, "requests") == "6 running · 8 waiting")
            assert browser.current_url.endswith("#server=2")
            _all(browser, ".requests tbody .id button")[0].click()
            until(lambda: _all(browser, ".heat-map td"))
            _cards(browser)[1].click()
            until(
                lambda: (
                    _text(browser, "#state-words") == "No numbers" and "cannot be reached" in _text(browser, "#problem")
                )
            )
            resize(browser, 360, 800)
            assert _width(browser) <= 360
            assert not console_errors(browser)
            browser.get("about:blank")


def _cards(browser: Any) -> list[Any]:
    return _all(browser, "#servers button")
