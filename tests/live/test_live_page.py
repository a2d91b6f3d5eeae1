"""The page of the example application that follows a task, in a real browser against a real server.

``PICTURE=docs/_static/live-page.png`` has the picture written that the README and the documentation show.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from prove.server import gunicorn

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.live

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "<img src=x onerror=alert(1)>"


def missing(reason: str) -> None:
    if os.environ.get("REQUIRE_SERVICES") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the example application as `make demo` does, but with two workers; give its address."""
    folder = tmp_path_factory.mktemp("page")
    factory = f"example_app:create_app(instance_path={str(folder / 'instance')!r})"
    options = ("--config", "python:example_app.server", "--workers", "2", "--threads", "4")
    with gunicorn(folder / "log", factory, *options) as server:
        yield f"http://127.0.0.1:{server.port}"
        assert "Traceback" not in server.output()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Give a Chromium: that of the system, since Playwright's own would have to be downloaded."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        missing(f"none of {', '.join(BROWSERS)} is installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    with sync_playwright() as playwright:
        # Its sandbox does not work for root, as in a container; the pages are our own.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """Give the page, opened; it must not complain, as a browser does where the content policy is offended."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1000, "height": 860}, device_scale_factor=2)
    page.set_default_timeout(20_000)
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append("a dialog"), dialog.dismiss()))
    page.goto(f"{address}/live")
    yield page
    page.close()
    assert complaints == []


def test_chromium_follows_a_task_to_its_end(page: Page) -> None:
    from playwright.sync_api import expect

    page.click("#go")
    expect(page.locator("#state")).to_have_text("Running")
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator("#messages li")).to_have_count(2)
    expect(page.locator("#doing")).to_have_text(re.compile("on the way to "))
    assert 0 < float(page.locator("#progress").evaluate("bar => bar.value")) < 100
    expect(page.locator("#messages li")).to_have_count(5)
    if picture := os.environ.get("PICTURE"):
        page.screenshot(path=Path(picture))
    expect(page.locator("#state")).to_have_text("Completed", timeout=20_000)
    expect(page.locator("#messages li")).to_have_count(8)
    expect(page.locator("#messages li").first).to_have_text("Ada visits Mercury: the smallest, and the fastest.")
    expect(page.locator("#percent")).to_have_text("100 %")
    expect(page.locator("#outcome")).to_contain_text('"last": "Neptune"')
    expect(page.locator("#connection")).to_have_text("The stream has ended with the task.")
    expect(page.locator("#stop")).to_be_disabled()


def test_the_button_stops_it_and_another_can_follow(page: Page) -> None:
    from playwright.sync_api import expect

    page.click("#go")
    expect(page.locator("#state")).to_have_text("Running")
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("Aborted")
    expect(page.locator("#outcome")).to_have_text("Aborted by the user")
    first = page.locator("#id").text_content()
    page.click("#go")
    expect(page.locator("#state")).to_have_text("Running")
    assert page.locator("#id").text_content() != first
    expect(page.locator("#messages li")).to_have_count(1)
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("Aborted")


def test_what_comes_from_a_visitor_stays_text(page: Page) -> None:
    from playwright.sync_api import expect

    page.fill("#traveller", HOSTILE)
    page.click("#go")
    expect(page.locator("#messages li").first).to_contain_text(f"{HOSTILE} visits Mercury")
    assert page.locator("#task img").count() == 0
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("Aborted")


def test_a_browser_without_a_place_comes_back_until_it_has_seen_the_end(browser: Browser, address: str) -> None:
    """More pages than a worker has places for streams: each of them sees the task end."""
    from playwright.sync_api import expect

    pages = [browser.new_page() for _ in range(6)]
    for page in pages:
        page.goto(f"{address}/live")
        page.click("#go")
    for page in pages:
        expect(page.locator("#state")).to_have_text("Completed", timeout=60_000)
        expect(page.locator("#messages li")).to_have_count(8)
        page.close()
