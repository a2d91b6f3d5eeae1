"""The commands of ``flask asyncroute`` in processes of their own, beside a real server."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import ROOT
from tests.support.server import START, Server, gunicorn

pytestmark = pytest.mark.live

SECONDS = 60
COLOUR = re.compile(rb"\x1b\[[0-9;]*3[0-7]m")
NO_RICH = "raise ImportError('not installed in this test')\n"


class CommandLine:
    """Runs ``flask asyncroute`` for an app in new processes.

    :param app: the import string of the app.
    """

    def __init__(self, app: str) -> None:
        self.words = [sys.executable, "-m", "flask", "--app", app, "asyncroute"]

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.words, *words], cwd=ROOT, text=True, capture_output=True, timeout=SECONDS, **options
        )  # fmt: skip

    def submit(self, *words: str) -> str:
        done = self.run("submit", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def task(self, task_id: str) -> Any:
        return json.loads(self.run("show", task_id, "--json").stdout)

    def begin(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.words, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )  # fmt: skip


class Terminal:
    """A process whose output is a pseudo terminal."""

    def __init__(self, words: list[str], **environ: str) -> None:
        self.output = b""
        self._master, slave = pty.openpty()
        environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", **environ}
        self.process = subprocess.Popen(
            words, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environ
        )
        os.close(slave)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                self.output += os.read(self._master, 65_536)
            except OSError:  # the process has ended
                return

    def wait(self) -> int:
        code = self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        os.close(self._master)
        return code


@pytest.fixture(params=["sqlite", "postgresql"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Serve the app on a store of each kind; yield its import string."""
    store = {}
    if request.param == "postgresql":
        store = {"store": request.getfixturevalue("postgresql_url")}
    parameters = "".join(f", {name}={value!r}" for name, value in store.items())
    factory = f"tests.support.apps.operated:create_app({str(tmp_path)!r}{parameters})"
    with gunicorn(tmp_path / "log", factory, "--threads", "4", conf=START):
        yield factory


@pytest.fixture
def command(app: str) -> CommandLine:
    return CommandLine(app)


def test_a_timer_starts_tasks_and_reads_the_exit_code(command: CommandLine) -> None:
    for number in range(3):
        done = command.run("submit", "double", "--value", f"number={number}", "--wait")
        assert (done.returncode, done.stderr) == (0, "")
        task_id, end, result = done.stdout.splitlines()
        assert re.fullmatch(rf"Task {task_id} is Completed \(.*\)\.", end)
        assert result == f"Result: {2 * number}"
    failed = command.run("submit", "fail", "--wait")
    assert failed.returncode == 1
    assert re.fullmatch(r"Error: Task \S+ is Failed \(.*\): ValueError: no\n", failed.stderr)


def test_watch_prints_a_line_for_each_change(command: CommandLine, tmp_path: Path) -> None:
    with command.begin("watch", command.submit("held")) as watch:
        assert watch.stdout is not None
        for line in watch.stdout:
            if re.fullmatch(r"\d\d:\d\d:\d\d Running 50 % half way\n", line):
                break
        (tmp_path / "go").touch()
        rest = watch.stdout.read()
    assert watch.returncode == 0
    assert "is Completed" in rest


def test_watch_shows_a_progress_bar_on_a_terminal(
    command: CommandLine, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    pytest.importorskip("rich")
    terminal = Terminal([*command.words, "watch", command.submit("held")])
    eventually(lambda: b"half way" in terminal.output, SECONDS)
    (tmp_path / "go").touch()
    assert terminal.wait() == 0
    shown = terminal.output.decode()
    assert "━" in shown and "50 %" in shown and "[Put]/held" in shown and "100 %" in shown
    assert COLOUR.search(terminal.output)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"


def test_ctrl_c_ends_watch_but_not_the_task(
    command: CommandLine, tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    pytest.importorskip("rich")
    task_id = command.submit("held")
    terminal = Terminal([*command.words, "watch", task_id])
    eventually(lambda: b"half way" in terminal.output, SECONDS)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.wait() == 130
    shown = terminal.output.decode()
    assert f"Task {task_id} continues" in shown and "Traceback" not in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor stays hidden"
    assert command.task(task_id)["State"] == "Running"
    (tmp_path / "go").touch()
    assert command.run("watch", task_id).returncode == 0


def test_ctrl_c_ends_a_wait_but_not_the_task(command: CommandLine, tmp_path: Path) -> None:
    with command.begin("submit", "held", "--wait") as submit:
        assert submit.stdout is not None and submit.stderr is not None
        task_id = submit.stdout.readline().strip()
        submit.send_signal(signal.SIGINT)
        error = submit.stderr.read()
    assert submit.returncode == 130
    assert error.startswith("Error: ") and task_id in error and error.count("\n") == 1
    (tmp_path / "go").touch()
    assert command.run("watch", task_id).returncode == 0


def test_a_stop_ends_the_task_of_the_server(command: CommandLine) -> None:
    task_id = command.submit("held")
    with command.begin("watch", task_id) as watch:
        assert watch.stdout is not None and watch.stderr is not None
        for line in watch.stdout:
            if "half way" in line:
                break
        stopped = command.run("stop", task_id)
        error = watch.stderr.read()
    assert stopped.returncode == 0
    assert watch.returncode == 1
    assert "is Aborted" in error and "Aborted by the user" in error
    assert command.run("stop", command.submit("double", "--value", "number=1"), task_id).stdout


def test_a_list_can_be_piped_into_a_program_that_ends_early(
    command: CommandLine, tmp_path: Path
) -> None:
    command.run("submit", "double", "--value", "number=1")
    shell = shutil.which("sh")
    assert shell is not None
    for words in (["list", "--json"], ["list"], ["routes"]):
        line = shlex.join([*command.words, *words])
        done = subprocess.run(
            [shell, "-c", f"{line} | true"], cwd=ROOT, text=True, capture_output=True, timeout=SECONDS
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")


def test_tables_have_colours_only_on_a_terminal(command: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    task_id = command.run("submit", "fail", "--wait").stdout.strip()
    path = tmp_path / "output"
    with path.open("wb") as file:
        subprocess.run([*command.words, "list"], cwd=ROOT, stdout=file, check=True, timeout=SECONDS)
    assert task_id.encode() in path.read_bytes() and b"\x1b" not in path.read_bytes()
    for environ, has_colours in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        terminal = Terminal([*command.words, "list"], **environ)
        assert terminal.wait() == 0
        assert task_id.encode() in terminal.output
        assert bool(COLOUR.search(terminal.output)) is has_colours


def test_without_rich_the_output_is_plain_text(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "without" / "rich").mkdir(parents=True)
    (tmp_path / "without" / "rich" / "__init__.py").write_text(NO_RICH, "utf-8")
    path = os.pathsep.join([str(tmp_path / "without"), os.environ.get("PYTHONPATH", "")])
    (tmp_path / "go").touch()
    task_id = command.submit("held")
    for words in (["watch", task_id], ["list"]):
        terminal = Terminal([*command.words, *words], PYTHONPATH=path)
        assert terminal.wait() == 0
        assert task_id.encode() in terminal.output and b"\x1b" not in terminal.output


@pytest.mark.parametrize("words", [["list"], ["submit", "fail"], ["init-db"]])
@pytest.mark.parametrize(
    ("store", "part"),
    [
        ("postgresql+psycopg://ann:secret@127.0.0.1:1/db", "127.0.0.1"),
        ("sqlite:////proc/none/asyncroute.db", "/proc/none"),
    ],
)
def test_an_unreachable_store_is_one_line(
    tmp_path: Path, store: str, part: str, words: list[str]
) -> None:
    app = f"tests.support.apps.operated:create_app({str(tmp_path)!r}, store={store!r})"
    done = CommandLine(app).run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
    assert part in done.stderr and "secret" not in done.stderr


STARTS = """
from tests.support.apps.operated import create_app

app = create_app({folder!r})
app.extensions["async_routes"].start(app)
"""


def test_a_command_is_no_runner_even_if_the_app_calls_start(
    tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    module = tmp_path / "wsgi.py"
    module.write_text(STARTS.format(folder=str(tmp_path)), "utf-8")
    command = CommandLine(str(module))
    task_id = command.submit("double", "--value", "number=4")
    assert "No process" in command.run("workers").stderr
    # A runner would take over a task that has waited for over a second.
    with pytest.raises(subprocess.TimeoutExpired), command.begin("watch", task_id) as watch:
        try:
            watch.wait(2.5)
        finally:
            watch.kill()
    assert command.task(task_id)["State"] == "NotStarted"
    # In `flask run`, the call works.
    with Server(tmp_path / "log", "flask", "--app", str(module), "run", "--port", "0"):
        assert command.run("watch", task_id).returncode == 0


RECORDS_RUNNER = """
import pathlib

from flask_asyncroute.runtime import runtime_of

pathlib.Path({folder!r}, "is_runner").write_text(str(runtime_of(app).has_runner))
"""


@pytest.mark.parametrize("typed", ["asy", "asyncroute su"])
def test_completion_is_no_runner_even_if_the_app_calls_start(tmp_path: Path, typed: str) -> None:
    """click lists the names of commands without a context."""
    module = tmp_path / "wsgi.py"
    module.write_text((STARTS + RECORDS_RUNNER).format(folder=str(tmp_path)), "utf-8")
    flask = Path(sys.executable).with_name("flask")
    environ = {
        **os.environ, "_FLASK_COMPLETE": "bash_complete", "FLASK_APP": str(module),
        "COMP_WORDS": f"flask {typed}", "COMP_CWORD": str(len(typed.split())), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [flask], cwd=ROOT, env=environ, text=True, capture_output=True, timeout=SECONDS, check=True
    )
    assert f"plain,{'asyncroute' if typed == 'asy' else 'submit'}" in done.stdout
    assert (tmp_path / "is_runner").read_text() == "False"


def test_a_wrong_app_is_an_error_without_a_traceback(tmp_path: Path) -> None:
    done = CommandLine(f"{tmp_path}/none.py").run("list")
    assert done.returncode != 0
    assert "Error: " in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_with_a_narrow_encoding_gets_escapes(command: CommandLine) -> None:
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = command.run("submit", "double", "--value", "number=1", "--user", "東京", env=environ)
    assert done.returncode == 0
    done = command.run("list", env=environ)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u6771\\u4eac" in done.stdout
