"""The page in headless Chromium: opened, searched, driven by keys, in both schemes, at 4 and 32 layers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from djinn_fx.inspecting.page import document, page
from djinn_fx.passes.trace import SegmentCost
from tests.inspecting.subjects import trace


def test_the_page_needs_nothing_else_and_is_small() -> None:
    text = page(trace("llama-32"))
    assert len(text.encode()) < 5_000_000
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", text)
    assert "@import" not in text
    urls = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert urls == {"http://www.w3.org/2000/svg"}  # a namespace, not an address


def test_equal_layers_are_folded_in_the_data() -> None:
    few, many = (sum(len(p["blocks"]) for p in document(trace(f"llama-{n}"))["passes"]) for n in (8, 32))
    assert few == many


def test_what_a_model_is_called_cannot_break_the_page() -> None:
    text = page(replace(trace("llama-4"), model="</script><b>{{js}}"))
    assert text.count("</script>") == 2


def opened(browser: Any, path: Path, scheme: str = "light") -> tuple[Any, list[str]]:
    view = browser.new_page(color_scheme=scheme, viewport={"width": 1400, "height": 860})
    wrong: list[str] = []
    view.on("console", lambda message: wrong.append(message.text))
    view.on("pageerror", lambda error: wrong.append(str(error)))
    view.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
    view.goto(path.as_uri())
    view.wait_for_selector("body[data-ready]")
    return view, wrong


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    costs = tuple(SegmentCost(f"segment_{i}", 10.0 * (i + 1), 3, 1, False, 0.5) for i in range(5))
    traces = {"llama-4": replace(trace("llama-4"), costs=costs), "llama-32": trace("llama-32")}
    for name, each in traces.items():
        (folder / f"{name}.html").write_text(page(each), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in traces}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["llama-4", "llama-32"])
def test_it_opens(browser: Any, paths: dict[str, Path], name: str, scheme: str) -> None:
    view, wrong = opened(browser, paths[name], scheme)
    layers = int(name.rpartition("-")[2])
    assert view.locator("#strip rect").count() == layers + 1
    assert view.locator("#table tr[data-index]").count() == layers + 1
    assert view.locator("#strip .edited").count() == view.locator("#strip .tapped").count() == layers
    assert view.locator("nav button b").all_inner_texts()[:3] == ["capture", "annotate", "roles"]
    inside = "((root) => root.scrollHeight <= innerHeight && root.scrollWidth <= innerWidth)(document.documentElement)"
    assert view.evaluate(inside)
    ground = view.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(20, 23, 27)") == (scheme == "dark")
    assert wrong == []
    view.close()


def test_it_is_driven_by_keys(browser: Any, paths: dict[str, Path]) -> None:
    view, wrong = opened(browser, paths["llama-4"])
    current = view.locator("nav button[aria-current=true] b")
    assert current.inner_text() == "steer"
    view.keyboard.press("ArrowDown")
    assert current.inner_text() == "split"
    view.keyboard.press("ArrowUp")
    view.keyboard.press("ArrowUp")
    assert current.inner_text() == "head"
    view.keyboard.press("ArrowRight")
    view.keyboard.press("ArrowRight")
    assert view.locator("#detail h3").inner_text() == "segment_1 ends at resid_post.1"
    view.keyboard.press("ArrowLeft")
    assert view.locator("#detail h3").inner_text().startswith("segment_0 ")
    before = view.locator("#strip rect").first.get_attribute("width")
    view.keyboard.press("w")
    assert view.locator("#strip rect").first.get_attribute("width") != before
    view.keyboard.press("?")
    assert view.locator("#help").is_visible()
    view.keyboard.press("Escape")
    assert not view.locator("#help").is_visible()
    assert wrong == []
    view.close()


def test_it_is_searched_by_site(browser: Any, paths: dict[str, Path]) -> None:
    view, wrong = opened(browser, paths["llama-32"])
    view.keyboard.press("/")
    view.keyboard.type("resid_post.17")
    assert view.locator("#found").inner_text() == "resid_post.17 (1 of 1): shown by its equal in layer 1"
    assert view.locator("#table tr.chosen").get_attribute("data-index") == "17"
    marked = view.locator("#diff .marked").all_inner_texts()
    assert marked
    assert all("resid_post" in text for text in marked)
    view.keyboard.press("Escape")
    assert view.locator("#diff .marked").count() == 0
    view.keyboard.press("/")
    view.keyboard.type("nowhere")
    assert view.locator("#found").inner_text() == "no such site"
    assert wrong == []
    view.close()


def test_all_lines_and_folded_ones(browser: Any, paths: dict[str, Path]) -> None:
    view, wrong = opened(browser, paths["llama-32"])
    few = view.locator("#diff .rows > div").count()
    view.keyboard.press("a")
    assert view.locator("#diff .rows > div").count() > few
    assert "layers 2-30 of model.layers: identical to layer 1" in view.locator("#diff").inner_text()
    assert wrong == []
    view.close()
