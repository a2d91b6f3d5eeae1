"""The examples of the documentation page about progress bars, in a real browser.

``tests/support/htmx`` has two versions of htmx, unchanged, under its own license.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import running_browser
from tests.support.programs import ROOT
from tests.support.server import Server
from tests.test_docs import blocks

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.live

PAGE = "docs/howto/progress-bar.rst"
HTMX = sorted((ROOT / "tests" / "support" / "htmx").glob("*.js"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    page.set_default_timeout(20_000)
    errors: list[str] = []
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    # Browsers ask each site for an icon, and these examples have none.
    assert [error for error in errors if "404" not in error] == []


def serve(folder: Path, number: int) -> Server:
    """Return a server for an example of the page, with ``flask run``."""
    sources = [str(block.values[0]) for block in blocks() if PAGE in str(block.values[1])]
    app = folder / "app.py"
    app.write_text(sources[number])
    return Server(folder / "log", "flask", "--app", str(app), "run", "--port", "0")


def run(page: Page, server: Server) -> None:
    """Start the task with the button, and follow it to its end."""
    from playwright.sync_api import expect

    page.goto(f"http://127.0.0.1:{server.port}/")
    page.get_by_role("button", name="Create the report").click()
    for message in ("reading", "counting", "writing"):
        expect(page.locator("body")).to_contain_text(message, timeout=20_000)
    assert 60 < page.locator("progress").evaluate("bar => bar.value") < 70
    expect(page.locator("body")).to_contain_text("The report is ready.", timeout=20_000)


def test_the_script_shows_the_progress(page: Page, tmp_path: Path) -> None:
    with serve(tmp_path, 0) as server:
        run(page, server)
        assert page.locator("progress").evaluate("bar => bar.value") == 100
        server.assert_no_traceback()


@pytest.mark.parametrize("script", HTMX, ids=[path.stem for path in HTMX])
def test_htmx_shows_the_progress(page: Page, tmp_path: Path, script: Path) -> None:
    (tmp_path / "static").mkdir()
    shutil.copy(script, tmp_path / "static" / "htmx.min.js")
    with serve(tmp_path, 1) as server:
        run(page, server)
        assert page.locator("progress").count() == 0
        assert page.locator("button").count() == 0
        server.assert_no_traceback()
