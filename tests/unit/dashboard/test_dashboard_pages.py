# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The page as files: nothing inline, nothing from elsewhere, and text that can be read in both themes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.server.dashboard import pages

HERE = pages.HERE
SCRIPTS = sorted((HERE / "assets").glob("*.js"))
STYLES = sorted((HERE / "assets").glob("*.css"))
TEXT_CONTRAST, SHAPE_CONTRAST = 4.5, 3.0


@pytest.fixture
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(pages.create_pages_router())
    with TestClient(app) as client:
        yield client


def test_every_file_comes_with_a_policy_that_forbids_inline_and_foreign_code(client: TestClient) -> None:
    names = [path.name for path in (HERE / "assets").iterdir()]
    for path in ["dashboard", *(f"dashboard/assets/{name}" for name in [*names, "settings.json"])]:
        answer = client.get(f"/deltamem/{path}")
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_the_browser_has_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/deltamem/dashboard/assets/app.js")
    again = client.get("/deltamem/dashboard/assets/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fpages.py", "%2e%2e/pages.py", "__init__.py"])
def test_only_the_pages_own_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/deltamem/dashboard/assets/{name}").status_code == 404


def test_the_page_has_nothing_inline_and_all_it_names_is_there(client: TestClient) -> None:
    page = client.get("/deltamem/dashboard").text
    assert 'data-watching="no"' in page
    assert not re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", page)
    linked = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert len(linked) >= 6
    for link in linked:
        assert client.get(f"/deltamem/{link}").status_code == 200, link


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_make_no_markup_of_text_and_import_only_each_other(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|cssText", code)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", code)
    for name in re.findall(r'from "\./([^"]+)"', code):
        assert (path.parent / name).is_file(), name
    assert len(code.splitlines()) < 300


@pytest.mark.parametrize("path", STYLES, ids=lambda path: path.name)
def test_styles_load_nothing_and_name_only_colours_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"@import|url\(|#[0-9a-f]{3,8}\b", text if path.name != "colours.css" else "")
    known = set(_colours()) | {"--v", "--top"}
    assert set(re.findall(r"var\((--[a-z-]+)", text)) <= known


def test_settings_tell_default_and_meaning_of_every_field(client: TestClient) -> None:
    told = client.get("/deltamem/dashboard/assets/settings.json").json()
    assert told.keys() == DeltaMemConfig.model_fields.keys()
    assert told["keep_ratio"]["default"] == DeltaMemConfig().keep_ratio
    assert all(one["help"] for one in told.values())


def test_without_its_files_the_page_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "HERE", tmp_path)
    with pytest.raises(RuntimeError, match=r"page\.html cannot be read"):
        pages.create_pages_router()


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_has_contrast_on_everything_it_stands_on(theme: int) -> None:
    colours = {name: values[theme] for name, values in _colours().items()}
    pairs = [(text, ground) for text in ("text", "muted", "accent", "warn") for ground in ("page", "card", "raised")]
    pairs += [("bad", "card"), ("good", "card"), ("bad", "bad-soft"), ("warn", "warn-soft"), ("bad", "page")]
    pairs += [("on-accent", "accent")]
    low = {
        (text, ground): found
        for text, ground in pairs
        if (found := _contrast(colours[f"--{text}"], colours[f"--{ground}"])) < TEXT_CONTRAST
    }
    assert not low


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_shapes_and_edges_have_contrast_on_the_card(theme: int) -> None:
    colours = {name: values[theme] for name, values in _colours().items()}
    shapes = (
        "hot",
        "cold",
        "other",
        "seen",
        "edge",
        "accent",
        "good",
        "bad",
        "warn",
        "heat-all",
        "heat-hot",
        "heat-cold",
    )
    low = {
        name: found for name in shapes if (found := _contrast(colours[f"--{name}"], colours["--card"])) < SHAPE_CONTRAST
    }
    assert not low
    for top in ("all", "hot", "cold"):
        assert _contrast(colours[f"--heat-{top}"], colours["--heat-low"]) > TEXT_CONTRAST


def test_the_contrast_of_known_pairs_is_computed_right() -> None:
    assert _contrast("#000000", "#ffffff") == pytest.approx(21)
    assert _contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def _colours() -> dict[str, tuple[str, str]]:
    text = (HERE / "assets" / "colours.css").read_text(encoding="utf-8")
    found = re.findall(r"(--[a-z-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", text)
    assert len(found) == len(re.findall(r"^\s+--", text, re.MULTILINE)), "a colour was not understood"
    return {name: (light, dark) for name, light, dark in found}


def _contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2.2."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
