"""The commands of the README, the tour, the start page and the tutorial, run as printed against a
real server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from example_app import trials, works
from tests.support.event_streams import messages

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.rst"
TUTORIAL = ROOT / "docs" / "tutorial"


def blocks_of(page: Path, language: str) -> list[list[str]]:
    """Return the lines of each code block of a page in a language."""
    found = re.findall(
        rf"^\.\. code-block:: {language}\n\n((?:    .*\n|\n)+)",
        page.read_text("utf-8"),
        re.MULTILINE,
    )
    return [[line[4:] for line in block.rstrip().split("\n")] for block in found]


def eventually(condition: Callable[[], Any], seconds: float) -> Any:
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if value := condition():
            return value
        pause.wait(0.02)
    raise AssertionError(f"Not true within {seconds} s.")


@contextmanager
def serving(folder: Path, log: Path, *command: str) -> Iterator[str]:
    """Run a server in ``folder`` with its output in ``log``; yield its address once it listens."""
    with log.open("wb") as file:
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
        )
    try:
        address = r"(?:Listening at|Running on)\S* (http://127\.0\.0\.1:\d+)"
        yield eventually(lambda: re.search(address, log.read_text()), 30)[1]
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
    text = log.read_text()
    # The first attempts of a report of the example fail on purpose.
    assert text.count("Traceback") == text.count("failed; the task runs again"), text


GUNICORN = (
    "gunicorn",
    "--workers",
    "4",
    "--threads",
    "4",
    "--bind",
    "127.0.0.1:0",
    "--no-control-socket",
)
HOOKS = ("--config", "python:example_app.server")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the example application as `make demo` does, on a free port; yield its address."""
    folder = tmp_path_factory.mktemp("server")
    factory = f"example_app:create_app(instance_path={str(folder / 'instance')!r})"
    with serving(ROOT, folder / "log", *GUNICORN, *HOOKS, factory) as address:
        yield address


class Shell:
    """A shell that runs printed lines one after the other and keeps ``$ID``.

    :param printed: the address in the lines, which is replaced by ``address``.
    """

    CURL = "curl() { command curl -sS --max-time 20 -w '%{stderr}%{http_code}\\n' \"$@\"; }\n"
    """Prints the status of each response to stderr."""

    def __init__(self, name: str, address: str, printed: str = "http://127.0.0.1:8000") -> None:
        for program in (name, "curl"):
            if shutil.which(program) is None:
                reason = f"{program} is not installed"
                if os.environ.get("REQUIRE_SERVICES") == "1":
                    pytest.fail(reason)
                pytest.skip(reason)
        self.name = name
        self.address = address
        self.printed = printed
        self.id = ""

    def run(self, line: str) -> tuple[list[int], str]:
        """Run a line; return the statuses of its responses and its output."""
        is_assignment = line.startswith("ID=")
        script = self.CURL + line.replace(self.printed, self.address)
        done = subprocess.run(
            [self.name, "-c", script + ('\nprintf %s "$ID"' if is_assignment else "")],
            capture_output=True, text=True, cwd=ROOT, env={**os.environ, "ID": self.id, "NO_PROXY": "127.0.0.1"}, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        if is_assignment:
            self.id = done.stdout
            assert re.fullmatch(r"[0-9a-f-]{36}", self.id), done.stdout
            eventually(lambda: self.state() != "NotStarted", 20)
        return [int(status) for status in done.stderr.split()], done.stdout

    def task(self, line: str) -> dict[str, Any]:
        """Run a line that must be answered 200; return the task, or other JSON, in its output."""
        statuses, printed = self.run(line)
        assert statuses == [200], printed
        return json.loads(printed)

    def state(self) -> str | None:
        """Return the State of the task, or None if anonymous callers cannot read it."""
        try:
            with urlopen(f"{self.address}/task/{self.id}", timeout=20) as answer:
                return str(json.load(answer)["State"])
        except HTTPError as error:
            assert error.code == 404
            error.close()
            return None

    def wait(self, line: str) -> None:
        """Wait until the task has ended, instead of running a line that sleeps."""
        assert line.startswith("sleep ")
        eventually(lambda: self.state() in ("Completed", "Failed", "Aborted"), 30)


@pytest.fixture(params=["sh", "bash"])
def shell(request: pytest.FixtureRequest, server: str) -> Shell:
    return Shell(request.param, server)


def started(printed: str) -> tuple[str, dict[str, Any]]:
    """Return the head and the task of a response that ``curl -i`` printed."""
    head, _, body = printed.replace("\r\n", "\n").partition("\n\n")
    return head, json.loads(body)


@pytest.mark.live
def test_the_tour(shell: Shell) -> None:
    start, poll, stop, query, upload, process, follow, permission = blocks_of(
        TUTORIAL / "tour.rst", "sh"
    )

    statuses, printed = shell.run(*start)
    head, task = started(printed)
    assert statuses == [202] and task["State"] == "NotStarted"
    assert head.startswith("HTTP/1.1 202 ACCEPTED") and f"Location: /task/{task['Id']}" in head

    keep, get, wait, get_again, result = poll
    assert shell.run(keep)[0] == [202]
    assert shell.task(get)["State"] == "Running"
    shell.wait(wait)
    task = shell.task(get_again)
    assert (task["State"], task["Result"]) == (
        "Completed",
        {"InnerValue": "coming from an argument"},
    )
    assert shell.task(result) == task["Result"]

    keep, delete = stop
    assert shell.run(keep)[0] == [202]
    assert shell.task(delete)["State"] == "Aborted"

    assert len(query) == 3
    for line in query:
        tasks: Any = shell.task(line)
        assert {task["State"] for task in tasks} == {"Aborted"}
        assert shell.id in {task["Id"] for task in tasks}

    keep, wait, result = upload
    assert shell.run(keep)[0] == [202]
    shell.wait(wait)
    assert shell.task(result)["rows"] == 8

    keep, get, delete = process
    assert shell.run(keep)[0] == [202]
    assert shell.task(get)["State"] == "Running"
    assert shell.task(delete)["State"] == "Aborted"

    keep, stream, wait = follow
    assert shell.run(keep)[0] == [202]
    statuses, printed = shell.run(stream)
    assert statuses == [200]
    found = list(messages([printed.encode()]))
    assert [message.name for message in found].count("message") == 8
    assert (found[-1].name, found[-1].data["State"]) == ("task.completed", "Completed")
    assert shell.task(wait)["State"] == "Completed"

    assert [shell.run(line)[0] for line in permission] == [[202], [200], [403], [404], [200]]


@pytest.mark.live
def test_the_readme(tmp_path: Path) -> None:
    (lines,) = blocks_of(README, "python")
    start, (get, wait) = blocks_of(README, "sh")
    assert len(lines) <= 16
    (tmp_path / "app.py").write_text("\n".join(lines), "utf-8")
    head, after = blocks_of(README, "text")
    with serving(tmp_path, tmp_path / "log", "flask", "run", "--port", "0") as address:
        shell = Shell("sh", address, "http://127.0.0.1:5000")
        statuses, printed = shell.run(*start)
        answer, task = started(printed)
        assert statuses == [202]
        for line in head[:3]:
            assert re.sub("[0-9a-f-]{36}", task["Id"], line) in answer
        for name in re.findall(r'"(\w+)":', head[4]):
            assert name in task
        shell.id = task["Id"]
        get, wait = (line.replace("<id>", task["Id"]) for line in (get, wait))
        eventually(lambda: shell.task(get).get("Progress") == 50, 20)
        ended = shell.task(wait)
    assert f'{{"State":"{ended["State"]}","Result":{json.dumps(ended["Result"])}'.replace(
        " ", ""
    ) in after[1].replace(" ", "")


@pytest.mark.live
def test_the_commands_on_the_start_page(shell: Shell) -> None:
    expected = {
        "An argument": [[202]],
        "A closure": [[202], [200], [409]],
        "Shared state": [[200], [202]],
        "Stop": [[202], [200]],
        "Wait": [[202], [200], [200]],
        "Follow": [[202], [200]],
        "Simple": [[200]],
        "deepObject": [[200]],
        "JSON": [[200]],
        "Anonymous caller: 401": [[401]],
        "The group may read": [[202], [200], [403], [404]],
        "The group may stop": [[202], [200]],
        "Named in the request": [[202], [200]],
    }
    for group in trials.trials(shell.address):
        for trial in group.trials:
            found = [sorted(shell.run(command)[0]) for command in trial.commands]
            assert found == expected.pop(trial.title), trial
    assert not expected
    for work in works.works(shell.address):
        assert set(shell.run(work.command)[0]) <= {200, 202}, work
    running: Any = shell.task(f"curl {shell.address}/tasks?State=Running")
    for task in running:
        shell.run(f"curl -X DELETE {shell.address}/task/{task['Id']}")


@pytest.mark.live
def test_the_commands_of_the_tutorial(tmp_path: Path) -> None:
    start, keep_one, ended, progress, stop, fail, query, operators, workers = blocks_of(
        TUTORIAL / "index.rst", "sh"
    )
    log = tmp_path / "log"
    flask = ("flask", "--app", "app", "run", "--port", "0")

    def printed(address: str) -> Shell:
        return Shell("sh", address, "http://127.0.0.1:5000")

    (tmp_path / "app.py").write_text((TUTORIAL / "first_app.py").read_text())
    with serving(tmp_path, log, *flask) as address:
        shell = printed(address)
        statuses, output = shell.run(*start)
        head, task = started(output)
        assert (
            statuses == [202]
            and f"Location: /task/{task['Id']}\n" in head
            and "Retry-After: 1" in head
        )
        assert shell.run(keep_one[0])[0] == [202]
        assert shell.task(keep_one[1])["State"] == "Running"
        shell.wait(ended[0])
        assert shell.task(ended[1])["State"] == "Completed"
        assert shell.task(ended[2]) == {"year": 2026, "sales": 12345}
        first = shell.id

    app = (TUTORIAL / "second_app.py").read_text()
    (tmp_path / "app.py").write_text(app)
    with serving(tmp_path, log, *flask) as address:
        shell = printed(address)
        assert shell.task(f"curl {address}/task/{first}")["State"] == "Completed"
        keep, _, get, _, get_again = progress
        assert shell.run(keep)[0] == [202]
        before = eventually(lambda: shell.task(get).get("Progress"), 20)
        eventually(lambda: shell.task(get_again)["Progress"] > before, 20)
        assert [shell.task(line)["State"] for line in stop] == ["Aborted", "Aborted"]
        assert shell.task(stop[1])["Error"] == "Aborted by the user"
        shell.run(fail[0])
        eventually(lambda: shell.state() == "Failed", 20)
        assert shell.task(fail[1])["Error"] == "400 Bad Request: The regions are north and south."
        assert shell.run(fail[2])[0] == [400]
        assert [shell.run(line) for line in query] == [([200], "[]\n")] * 2

    (line,) = blocks_of(TUTORIAL / "index.rst", "python")
    anchor = "app = Flask(__name__)\n"
    assert anchor in app
    (tmp_path / "app.py").write_text(app.replace(anchor, anchor + line[0] + "\n"))
    with serving(tmp_path, log, *flask) as address:
        shell = printed(address)
        assert [len(shell.task(line)) for line in query] == [4, 1]
        assert [len(shell.task(line)) for line in operators] == [2, 2]
    with serving(tmp_path, log, *GUNICORN, "app:app") as address:
        shell = printed(address)
        assert [shell.run(line)[0] for line in workers] == [[202], [200], [200]]

    (tmp_path / "test_reports.py").write_text((TUTORIAL / "test_reports.py").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
