"""The start page of the example application, in a real browser against a real server; and what
``make demo`` prints.

``PICTURES=/tmp`` writes screenshots to this folder. The README and the documentation show
``board.png``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.browser import accessibility_violations, running_browser
from tests.support.client import send
from tests.support.programs import ROOT
from tests.support.server import LISTENING, gunicorn
from tests.support.waiting import eventually_true

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.live

HOSTILE = "<img src=x onerror=alert(1)>"
WIDE = {"width": 1200, "height": 860}
NARROW = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the example application as `make demo` does, but with two workers; yield its address."""
    folder = tmp_path_factory.mktemp("board")
    factory = f"example_app:create_app(instance_path={str(folder / 'instance')!r})"
    options = ("--config", "python:example_app.server", "--workers", "2", "--threads", "4")
    with gunicorn(folder / "log", factory, *options) as server:
        yield f"http://127.0.0.1:{server.port}"
        log = server.output()
        # The attempts of a report fail on purpose.
        assert log.count("Traceback") == log.count("failed; the task runs again")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import expect

    with running_browser() as browser:
        expect.set_options(timeout=30_000)
        yield browser


class Visitors:
    """Opens the start page as new visitors, and collects what their browsers must not do."""

    def __init__(self, browser: Browser, address: str) -> None:
        self._browser = browser
        self.address = address
        self.faults: list[str] = []

    def open(self, person: str | None = None, **options: Any) -> Page:
        """Open the page in a browser context of its own, and sign in with one click."""
        context = self._browser.new_context(**{"viewport": WIDE, **options})
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", self._check_message)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("dialog", lambda dialog: (self.faults.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: self._check_request(request.url))
        page.goto(self.address)
        if person is not None:
            page.get_by_role("button", name=f"Sign in as {person}").click()
        return page

    def close(self) -> None:
        for context in self._browser.contexts:
            context.close()

    def _check_message(self, message: Any) -> None:
        # Chromium logs each response with an error status; the test expects these responses.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.faults.append(message.text)

    def _check_request(self, url: str) -> None:
        if not url.startswith((f"{self.address}/", "data:")):
            self.faults.append(f"a request to {url}")


@pytest.fixture
def visitors(browser: Browser, address: str) -> Iterator[Visitors]:
    visitors = Visitors(browser, address)
    yield visitors
    visitors.close()
    assert visitors.faults == []


def work(page: Page, title: str) -> Locator:
    """Return the form of a kind of work."""
    return page.locator("form.work").filter(has=page.get_by_role("heading", name=title))


def run(page: Page, title: str) -> None:
    work(page, title).locator("button").click()


def test_the_board_follows_a_task_to_its_end(visitors: Visitors) -> None:
    from playwright.sync_api import expect

    page = visitors.open("alice")
    page.evaluate("window.isSamePage = true")
    expect(page.locator("#connection")).to_have_text("Live")
    run(page, "Tour of the planets")
    for place in (page.locator("#board li").first, work(page, "Tour").locator(".started")):
        expect(place.locator(".state")).to_have_text("Running")
        expect(place.locator(".doing")).to_have_text(re.compile("on the way to "))
        assert 0 <= float(place.locator("progress").evaluate("bar => bar.value")) < 100
    for place in (page.locator("#board li").first, work(page, "Tour").locator(".started")):
        expect(place.locator(".state")).to_have_text("Completed")
        expect(place.locator(".percent")).to_have_text("100 %")
    expect(page.locator("#news")).to_have_text("POST /tour: Completed")
    expect(page.locator("#board li").first.locator(".stop")).to_have_count(0)
    assert page.evaluate("window.isSamePage"), "the page was loaded again"
    page.locator("#board a").first.click()
    expect(page.locator("main")).to_contain_text('"last": "Neptune"')


def test_the_board_shows_tasks_that_curl_starts(visitors: Visitors) -> None:
    from playwright.sync_api import expect

    page = visitors.open("alice")
    expect(page.locator("#connection")).to_have_text("Live")
    command = shlex.split(page.locator("details pre", has_text="/report").text_content() or "")
    subprocess.run([*command, "-sS", "--max-time", "20"], check=True, stdout=subprocess.DEVNULL)
    row = page.locator("#board li", has_text="POST /report").first
    expect(row.locator(".doing")).to_have_text(re.compile("^Attempt 1 failed"))
    expect(row.locator(".state")).to_have_text("Completed")


def test_a_second_run_of_a_report_shows_the_same_task(visitors: Visitors) -> None:
    from playwright.sync_api import expect

    page = visitors.open("carol")
    rows = page.locator("#board li", has_text="POST /report")
    before = rows.count()
    for _ in range(2):
        run(page, "Report from an unreliable service")
        expect(work(page, "Report").locator(".started a")).to_be_visible()
        expect(work(page, "Report").locator("button")).to_be_enabled()
    expect(rows).to_have_count(before + 1)
    rows.first.get_by_role("button").click()
    expect(rows.first.locator(".state")).to_have_text("Aborted")


def test_the_board_stops_a_task(visitors: Visitors) -> None:
    from playwright.sync_api import expect

    page = visitors.open("bob")
    run(page, "Prime numbers")
    row = page.locator("#board li").first
    row.get_by_role("button", name="Stop POST /primes/").click()
    expect(row.locator(".state")).to_have_text("Aborted")
    expect(row.locator(".doing")).to_have_text("Aborted by the user")


def test_an_upload_shows_its_progress_and_then_that_of_its_task(
    visitors: Visitors, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    table = tmp_path / "table.csv"
    table.write_text("number,text\n" + "".join(f"{n},{'x' * 20}\n" for n in range(100_000)))
    page = visitors.open("alice")
    form = work(page, "Summary of a CSV file")
    started = form.locator(".started")
    # Hold the response, so that the page shows the complete upload.
    held: list[Any] = []
    page.route("**/csv-summary", lambda route: held.append(route))
    form.locator("input[type=file]").set_input_files(table)
    run(page, "Summary of a CSV file")
    expect(started).to_have_text(re.compile("^Uploading"))
    expect(started.get_by_role("progressbar", name="Upload")).to_be_visible()
    expect(form.locator("button")).to_be_disabled()
    while not held:
        page.wait_for_timeout(10)  # handles the browser's events
    held[0].continue_()
    expect(started.locator(".state")).to_have_text("Completed")
    expect(started.locator(".doing")).to_have_text("100000 rows")
    expect(started.locator(".percent")).to_have_text("100 %")


def test_a_refused_upload_shows_the_reason(visitors: Visitors) -> None:
    from playwright.sync_api import expect

    page = visitors.open()
    page.route(
        "**/tour",
        lambda route: route.fulfill(status=503, json={"detail": "The queue is full."}),
    )
    run(page, "Tour of the planets")
    expect(page.get_by_role("alert")).to_have_text("The queue is full.")
    expect(work(page, "Tour").locator(".started")).to_be_hidden()
    expect(work(page, "Tour").locator("button")).to_be_enabled()


def test_a_second_person_sees_nothing_of_the_first_ones_tasks(visitors: Visitors) -> None:
    from playwright.sync_api import expect

    alice, bob, nobody = visitors.open("alice"), visitors.open("bob"), visitors.open()
    for page in (alice, bob, nobody):
        expect(page.locator("#connection")).to_have_text("Live")
    work(alice, "Tour").get_by_label("Traveller").fill("Alice in orbit")
    run(alice, "Tour of the planets")
    path = work(alice, "Tour").locator(".started a").get_attribute("href")
    assert path is not None
    expect(alice.locator("#board .Completed").first).to_be_visible()
    for page in (bob, nobody):
        for url in ("/", "/tasks"):
            page.goto(visitors.address + url)
            assert path not in page.content()
        assert page.request.get(visitors.address + path).status == 404


def test_input_of_a_visitor_is_escaped(visitors: Visitors) -> None:
    from playwright.sync_api import expect

    page = visitors.open("carol")
    page.evaluate("document.getElementById('traveller').maxLength = 100")
    work(page, "Tour").get_by_label("Traveller").fill(HOSTILE)
    run(page, "Tour of the planets")
    expect(page.locator("#board .Completed").first).to_be_visible()
    page.locator("#board a").first.click()
    expect(page.locator("main")).to_contain_text(HOSTILE)
    assert page.locator("main img").count() == 0


def test_the_page_works_without_javascript(visitors: Visitors, tmp_path: Path) -> None:
    from playwright.sync_api import expect

    page = visitors.open("carol", java_script_enabled=False)
    assert page.locator("button.copy:visible, button.stop:visible").count() == 0
    run(page, "Prime numbers")
    expect(page.locator("h1")).to_have_text("[Post]/primes/<int:limit>")
    page.get_by_role("link", name="flask_asyncroute").click()
    expect(page.locator("#board li").first).to_contain_text("POST /primes/")
    page.locator("#board a").first.click()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("main")).to_contain_text("Aborted by the user")
    page.get_by_role("link", name="flask_asyncroute").click()
    expect(page.locator("#board li").first.locator(".state")).to_have_text("Aborted")
    page.locator("details summary").first.click()
    expect(page.locator("details pre").first).to_be_visible()
    table = tmp_path / "table.csv"
    table.write_text("a\n1\n")
    work(page, "Summary").locator("input[type=file]").set_input_files(table)
    run(page, "Summary of a CSV file")
    expect(page.locator("h1")).to_have_text("[Post]/csv-summary")


def test_commands_can_be_copied(visitors: Visitors) -> None:
    from playwright.sync_api import expect

    page = visitors.open(permissions=["clipboard-read", "clipboard-write"])
    for title in ("Prime numbers", "A closure"):
        details = page.locator("article", has=page.get_by_role("heading", name=title)).locator(
            "details"
        )
        details.locator("summary").click()
        details.get_by_role("button", name=f"Copy the commands for {title}").click()
        expect(details.locator(".copy")).to_have_text("Copied")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == (details.locator("pre").text_content() or "").strip()


def test_more_pages_than_streams_stay_up_to_date(visitors: Visitors) -> None:
    """Pages over the limit of streams reconnect, and read the board each time."""
    from playwright.sync_api import expect

    pages = [visitors.open("alice") for _ in range(6)]
    run(pages[0], "Plain view")
    path = work(pages[0], "Plain view").locator(".started a").get_attribute("href")
    for page in pages:
        row = page.locator("#board li", has=page.locator(f'a[href="{path}"]'))
        expect(row.locator(".state")).to_have_text("Completed")


@pytest.mark.parametrize(
    ("name", "person", "options"),
    [
        ("board", "alice", {}),
        ("board-dark", "bob", {"color_scheme": "dark"}),
        ("board-narrow", "carol", {"viewport": NARROW}),
    ],
)
def test_the_page_is_accessible(
    visitors: Visitors, name: str, person: str, options: dict[str, Any]
) -> None:
    from playwright.sync_api import expect

    page = visitors.open(person, **options, device_scale_factor=2)
    run(page, "Plain view")
    expect(page.locator("#board .Completed").first).to_be_visible()
    run(page, "Prime numbers")
    run(page, "Report from an unreliable service")
    expect(page.locator("#board li").first.locator(".doing")).to_contain_text("Attempt 1 failed")
    run(page, "Tour of the planets")
    expect(page.locator("#board .doing").first).to_have_text(re.compile("on the way to [EJSUN]"))
    width = options.get("viewport", WIDE)["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    if pictures := os.environ.get("PICTURES"):
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=Path(pictures) / f"{name}.png", full_page="viewport" in options)
    for summary in page.locator("summary").all()[:2]:
        summary.click()
    assert accessibility_violations(page) == []
    # All at once, because the buttons of tasks that end disappear.
    urls = page.locator("#board .stop").evaluate_all("found => found.map(each => each.dataset.url)")
    for url in urls:
        page.request.delete(f"{visitors.address}{url}")
    page.locator("#board a").first.click()
    assert accessibility_violations(page) == []


# The terminal


def recipe(port: int) -> list[str]:
    """Return the command of ``make demo``, for the Python that runs the tests."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    printed = subprocess.run(
        ["make", "--dry-run", "--old-file=.venv-demo/.made", "demo", f"PORT={port}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    command = printed[printed.index(".venv-demo/bin/python") :]
    return [sys.executable, *shlex.split(command.replace("\\\n", ""))[1:]]


def test_the_demo_says_how_to_use_another_port_if_its_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            recipe(port), cwd=ROOT, env={**os.environ, "FLASK_ASYNCROUTE_STORE": "memory://"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"Port {port} is in use. Use another one: make demo PORT={port + 1}\n" in done.stderr
    assert "Traceback" not in done.stderr and "Connection in use" not in done.stderr


def test_the_demo_says_after_ctrl_c_how_many_tasks_it_waits_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = recipe(0)
    command[-1] = f"example_app:create_app(instance_path={str(tmp_path / 'instance')!r})"
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        port = int(eventually_true(lambda: LISTENING.search(log.read_text()), 60)[1])
        for _ in range(2):
            assert send(port, "POST", "/tour").status == 202
        eventually_true(lambda: log.read_text().count("started.") == 2, 60)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert log.read_text().count("Waiting for 2 tasks, up to 5 s.") == 1
    assert "Traceback" not in log.read_text()
