"""The HTML pages in a real browser against a real server, with and without JavaScript.

``PICTURES=folder`` writes a picture of each page, in light and dark colours and on a phone.
``PICTURE=docs/_static/task-page.png`` writes the picture for the documentation.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import running_browser
from tests.support.server import START, Server, gunicorn

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.live

SIZES = {"wide": {"width": 1100, "height": 760}, "phone": {"width": 390, "height": 800}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return ``serve(**config)``, which runs the app of `tests.support.apps.forms`."""
    servers: list[Server] = []

    def start(**config: Any) -> Server:
        values = {"folder": str(tmp_path), **config}
        parameters = ", ".join(f"{name}={value!r}" for name, value in values.items())
        factory = f"tests.support.apps.forms:create_app({parameters})"
        server = gunicorn(tmp_path / "log", factory, "--workers", "2", "--threads", "6", conf=START)
        servers.append(server)
        return server.__enter__()

    yield start
    for server in servers:
        server.stop()
        assert "Exception on" not in server.output(), "a request failed"


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Return ``open_page(server, **options)``, which opens the form.

    The pages must log no errors and request nothing from another host.
    """
    errors: list[str] = []
    contexts: list[Any] = []

    def start(server: Server, **options: Any) -> Page:
        address = f"http://127.0.0.1:{server.port}"
        context = browser.new_context(**{"viewport": SIZES["wide"], **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)

        def check(request: Any) -> None:
            if not request.url.startswith((address, "data:,")):
                errors.append(f"a request to {request.url}")

        page.on("request", check)
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: (errors.append("a dialog"), dialog.dismiss()))
        page.goto(f"{address}/")
        return page

    yield start
    for context in contexts:
        context.close()
    # Chromium logs the status of a document that is a problem page.
    assert [
        error for error in errors if "the server responded with a status of 4" not in error
    ] == []


def submit(page: Page, path: str | None = None) -> str:
    """Send the form, or an empty form to another route; return the URL of the task's page."""
    if path is None:
        page.set_input_files(
            "input[type=file]",
            {"name": "may.csv", "mimeType": "text/csv", "buffer": b"a;b\n1;2\n"},
        )
    else:
        page.evaluate("path => { document.forms[0].action = path }", path)
    page.click("button")
    page.wait_for_url(re.compile("/task/"))
    return page.url


def assert_fits(page: Page) -> None:
    """Check that nothing scrolls horizontally, neither the page nor the table of a list."""
    for name in ("html", ".wide"):
        for element in page.query_selector_all(name):
            assert element.evaluate("element => element.scrollWidth <= element.clientWidth"), name


@pytest.mark.parametrize(
    "config", [{}, {"max_streams": 0}], ids=["stream", "streams at their limit"]
)
def test_the_page_of_a_task_follows_it_to_its_end(
    serve: Callable[..., Server],
    open_page: Callable[..., Page],
    tmp_path: Path,
    config: dict[str, Any],
) -> None:
    from playwright.sync_api import expect

    page = open_page(serve(**config))
    submit(page)
    page.evaluate("window.isSamePage = true")
    page.focus("#actions button")
    expect(page.locator("#status")).to_have_text("Running")
    for number, message in enumerate(["Reading", "Checking", "Writing"]):
        expect(page.locator("#progress .message")).to_contain_text(message)
        assert page.locator("text=Continue").count() == 0
        (tmp_path / f"go-{number}").touch()
        if number < 2:
            assert page.evaluate("document.activeElement.textContent") == "Stop"
    expect(page.locator("#status")).to_have_text("Completed")
    expect(page.locator("#outcome pre")).to_contain_text('"title": "May <b>sales</b>"')
    expect(page.locator("#outcome pre")).to_contain_text('"bytes": 8')
    expect(page.locator("#actions button")).to_have_count(0)
    expect(page).to_have_title("Completed: Import of a table")
    assert page.evaluate("window.isSamePage"), "the page was reloaded"
    page.click("text=Continue")
    assert page.url.endswith("/thanks")


def test_a_route_without_events_is_polled(
    serve: Callable[..., Server], open_page: Callable[..., Page], tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    page = open_page(serve())
    submit(page, "/quiet")
    expect(page.locator("#status")).to_have_text("Running")
    (tmp_path / "go-0").touch()
    expect(page.locator("#status")).to_have_text("Completed")


def test_without_javascript_the_page_reloads_until_the_end(
    serve: Callable[..., Server], open_page: Callable[..., Page], tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    page = open_page(serve(), java_script_enabled=False)
    submit(page)
    expect(page.locator("#progress .message")).to_contain_text("Reading")
    (tmp_path / "go-0").touch()
    expect(page.locator("#progress .message")).to_contain_text("Checking")
    (tmp_path / "go-1").touch()
    (tmp_path / "go-2").touch()
    expect(page.locator("#status")).to_have_text("Completed")
    expect(page.locator("#outcome pre")).to_contain_text('"bytes": 8')
    page.click("text=Continue")
    assert page.url.endswith("/thanks")


@pytest.mark.parametrize("has_javascript", [True, False], ids=["JavaScript", "no JavaScript"])
def test_the_button_stops_a_task(
    serve: Callable[..., Server], open_page: Callable[..., Page], has_javascript: bool
) -> None:
    from playwright.sync_api import expect

    page = open_page(serve(), java_script_enabled=has_javascript)
    url = submit(page)
    page.click("text=Stop")
    expect(page.locator("#status")).to_have_text("Aborted")
    expect(page.locator("#outcome")).to_contain_text("Aborted by the user")
    assert page.url == url


@pytest.mark.parametrize(
    ("config", "has_javascript"),
    [({}, True), ({"max_streams": 0}, True), ({}, False)],
    ids=["stream", "streams at their limit", "no JavaScript"],
)
def test_the_page_shows_when_the_code_of_a_stopped_task_has_ended(
    serve: Callable[..., Server],
    open_page: Callable[..., Page],
    tmp_path: Path,
    config: dict[str, Any],
    has_javascript: bool,
) -> None:
    from playwright.sync_api import expect

    page = open_page(serve(**config), java_script_enabled=has_javascript)
    submit(page, "/deaf")
    expect(page.locator("#progress .message")).to_have_text("Calling the other office")
    page.click("text=Stop")
    expect(page.locator("#status")).to_have_text("Stopping")
    expect(page.locator("#outcome")).to_contain_text("Aborted by the user")
    (tmp_path / "go-0").touch()
    expect(page.locator("#status")).to_have_text("Aborted")
    expect(page.locator("#task")).not_to_have_attribute("data-live", re.compile(""))


def test_a_stop_from_elsewhere_is_shown(
    serve: Callable[..., Server], open_page: Callable[..., Page]
) -> None:
    from playwright.sync_api import expect

    server = serve()
    page, other = open_page(server), open_page(server)
    url = submit(page)
    expect(page.locator("#status")).to_have_text("Running")
    other.goto(url)
    other.click("text=Stop")
    expect(page.locator("#status")).to_have_text("Aborted")
    expect(page.locator("#actions button")).to_have_count(0)


def test_a_page_of_a_purged_task_shows_the_problem(
    serve: Callable[..., Server], open_page: Callable[..., Page]
) -> None:
    from playwright.sync_api import expect

    page = open_page(serve())
    page.goto(page.url + "task/missing")
    expect(page.locator("h1")).to_have_text("Task not found")
    page.click("text=All tasks")
    expect(page.locator("h1")).to_have_text("Tasks")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_all_pages_fit_the_window(
    serve: Callable[..., Server],
    open_page: Callable[..., Page],
    tmp_path: Path,
    scheme: str,
    size: str,
) -> None:
    from playwright.sync_api import expect

    server = serve()
    page = open_page(server, viewport=SIZES[size], color_scheme=scheme, device_scale_factor=2)
    home = page.url

    def check(name: str) -> None:
        assert_fits(page)
        picture = os.environ.get("PICTURE")
        if picture and (name, scheme, size) == ("running", "light", "wide"):
            page.locator("main").screenshot(path=Path(picture))
        if folder := os.environ.get("PICTURES"):
            page.screenshot(path=Path(folder) / f"{name}-{scheme}-{size}.png")

    for name, path in (("failed", "/fail"), ("waiting", "/endless"), ("running", None)):
        page.goto(home)
        submit(page, path)
        expect(page.locator("#status")).to_have_text("Failed" if name == "failed" else "Running")
        if name == "running":
            (tmp_path / "go-0").touch()
            expect(page.locator("#progress .message")).to_contain_text("Checking")
        check(name)
    for number in (1, 2):
        (tmp_path / f"go-{number}").touch()
    expect(page.locator("#status")).to_have_text("Completed")
    check("completed")
    page.click("text=All tasks")
    check("list")
    page.goto(f"{home}task/missing")
    check("problem")
