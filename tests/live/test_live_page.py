"""The page of the example application that follows a task, in a real browser against a real server.

``PICTURE=docs/_static/live-page.png`` writes the picture for the README and the documentation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.browser import running_browser
from tests.support.server import gunicorn

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.live

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the example application as `make demo` does, but with two workers; yield its address."""
    folder = tmp_path_factory.mktemp("page")
    factory = f"example_app:create_app(instance_path={str(folder / 'instance')!r})"
    options = ("--config", "python:example_app.server", "--workers", "2", "--threads", "4")
    with gunicorn(folder / "log", factory, *options) as server:
        yield f"http://127.0.0.1:{server.port}"
        assert "Traceback" not in server.output()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """Yield the open page. It must log no errors, such as violations of the content policy."""
    errors: list[str] = []
    page = browser.new_page(viewport={"width": 1000, "height": 860}, device_scale_factor=2)
    page.set_default_timeout(20_000)
    page.on(
        "console",
        lambda message: errors.append(message.text) if message.type == "error" else None,
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: (errors.append("a dialog"), dialog.dismiss()))
    page.goto(f"{address}/live")
    yield page
    page.close()
    assert errors == []


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
    expect(page.locator("#messages li").first).to_have_text(
        "Ada visits Mercury: the smallest, and the fastest."
    )
    expect(page.locator("#percent")).to_have_text("100 %")
    expect(page.locator("#outcome")).to_contain_text('"last": "Neptune"')
    expect(page.locator("#connection")).to_have_text("The stream has ended with the task.")
    expect(page.locator("#stop")).to_be_disabled()


def test_the_button_stops_a_task_and_another_can_be_started(page: Page) -> None:
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


def test_input_of_a_visitor_is_escaped(page: Page) -> None:
    from playwright.sync_api import expect

    page.fill("#traveller", HOSTILE)
    page.click("#go")
    expect(page.locator("#messages li").first).to_contain_text(f"{HOSTILE} visits Mercury")
    assert page.locator("#task img").count() == 0
    page.click("#stop")
    expect(page.locator("#state")).to_have_text("Aborted")


def test_a_browser_without_a_slot_reconnects_until_the_task_ends(
    browser: Browser, address: str
) -> None:
    """More pages are open than a worker has slots for streams."""
    from playwright.sync_api import expect

    pages = [browser.new_page() for _ in range(6)]
    for page in pages:
        page.goto(f"{address}/live")
        page.click("#go")
    for page in pages:
        expect(page.locator("#state")).to_have_text("Completed", timeout=60_000)
        expect(page.locator("#messages li")).to_have_count(8)
        page.close()
