"""The built documentation in a browser."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import running_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.live
ROOT = Path(__file__).parents[2]
TOO_WIDE = """
[...document.querySelectorAll("body *")]
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("pre, table, .related"))
  .map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--builder", "html", "docs", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_its_window_or_needs_another_host(
    built: Path, browser: Browser, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    wide = {}
    for path in sorted(built.rglob("*.html")):
        page.goto(path.as_uri())
        if page.evaluate("document.documentElement.scrollWidth") > width:
            wide[path.name] = page.evaluate(TOO_WIDE)[:3]
    page.close()
    assert len(asked) > 30
    assert {url for url in asked if not url.startswith(("file:", "data:"))} == set()
    assert wide == {}


def test_the_pages_follow_the_colour_scheme(built: Path, browser: Browser) -> None:
    filters = {}
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
        page.goto((built / "index.html").as_uri())
        filters[scheme] = page.evaluate("getComputedStyle(document.documentElement).filter")
        page.close()
    assert filters["light"] == "none"
    assert filters["dark"].startswith("invert")
