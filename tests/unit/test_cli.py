"""The commands of ``flask asyncroute``, called in this process with click's test runner."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from click.shell_completion import ShellComplete
from click.testing import Result
from flask import Flask, abort, request
from flask.cli import FlaskGroup, ScriptInfo

from flask_asyncroute import AsyncRoute, Callback, State, StoreUnavailable, current_task
from flask_asyncroute.cli import group, watching
from flask_asyncroute.cli.text import _fitting, escape, preview
from flask_asyncroute.engine.notifier import Notifier, Waiter
from flask_asyncroute.runtime import runtime_of
from flask_asyncroute.stores.base import Expect

ESCAPES = "\x1b[31mred\x9b\n\r\u202eevil\u2028\x07"
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]")
UNKNOWN = "00000000-0000-0000-0000-000000000000"
Run = Callable[..., Result]


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    app = make_app()
    async_routes = AsyncRoute(app)

    def check(year: int) -> None:
        if year < 1900:
            abort(400, f"{year} is too early.")

    @app.post("/reports/<int:year>")
    @async_routes.task(validate=check)
    def report(year: int) -> Any:
        return year

    @app.route("/now", methods=["GET", "POST"])
    @async_routes.task(executor="immediate")
    def now() -> Any:
        given = request.get_json(silent=True) or {}
        if "error" in given:
            raise ValueError(given["error"])
        current_task.set_progress(50, given.get("message"))
        return given.get("result", current_task.user)

    @app.post("/hook")
    @async_routes.task(executor="immediate", callback=Callback("https://example.com/"))
    def hook() -> None: ...

    @app.post("/fixed")
    @async_routes.task(cancellable=False)
    def fixed() -> None: ...

    return app


@pytest.fixture
def run(app: Flask) -> Run:
    """Return ``run(*words, input=None)``, which runs ``flask asyncroute`` with these words."""
    runner = app.test_cli_runner()

    def run(*words: str, input: str | bytes | None = None) -> Result:
        return runner.invoke(args=["asyncroute", *words], input=input)

    return run


def lines(result: Result) -> list[Any]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def submit(run: Run, *words: str, input: str | None = None) -> str:
    result = run("submit", *words, input=input)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout.split()[0])


def finished(run: Run, **given: Any) -> str:
    """Return the id of a task that has ended. ``error`` makes it fail."""
    return submit(run, "now", "--method", "post", "--json", "-", input=json.dumps(given))


def refused(result: Result, code: int, *parts: str) -> None:
    """Assert that a command has printed one line to stderr, with these parts."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def test_routes_are_listed(run: Run) -> None:
    result = run("routes")
    header, first, *others = result.stdout.splitlines()
    assert header.split() == ["Endpoint", "Methods", "Rule", "Executor", "Workers", "Timeout"]
    assert first.split() == ["report", "POST", "/reports/<int:year>", "thread", "2", "10:00:00"]
    assert len(others) == 3
    assert [each["Endpoint"] for each in lines(run("routes", "--json"))] == [
        "report", "now", "hook", "fixed",
    ]  # fmt: skip


def test_a_submitted_task_waits_for_a_server_process(run: Run) -> None:
    task_id = submit(run, "report", "--value", "year=2026", "--user", "ann")
    (task,) = lines(run("list", "--json"))
    assert (task["Id"], task["State"], task["User"]) == (task_id, "NotStarted", "ann")
    assert task["Url"].endswith("/reports/2026")


def test_the_body_is_the_json_of_a_file_or_of_stdin(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    path.write_text('{"result": [1, "ü"]}', "utf-8")
    task_id = submit(run, "now", "--method", "POST", "--json", str(path))
    assert lines(run("show", task_id, "--json"))[0]["Result"] == [1, "ü"]
    task_id = finished(run, result=2)
    assert lines(run("show", task_id, "--json"))[0]["Result"] == 2


def test_the_exit_code_of_a_wait_is_that_of_the_task(run: Run) -> None:
    done = run("submit", "now", "--method", "POST", "--user", "ann", "--wait")
    assert done.exit_code == 0
    assert re.search(
        r"^Task \S+ is Completed \(.*\)\.\nResult: \"ann\"$", done.stdout, re.MULTILINE
    )
    body = '{"error": "no"}'
    failed = run("submit", "now", "--method", "POST", "--json", "-", "--wait", input=body)
    assert failed.exit_code == 1
    assert "is Failed" in failed.stderr and "ValueError: no" in failed.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nope"], ["'nope'", "'report'"]),
        (["report"], ["report", "year"]),
        (["report", "--value", "year=x"], ["'x'"]),
        (["report", "--value", "month=1"], ["'month'", "year"]),
        (["report", "--value", "year"], ["'year'", "NAME=VALUE"]),
        (["report", "--value", "=1"], ["'=1'", "NAME=VALUE"]),
        (["report", "--value", "year=1", "--value", "year=2"], ["'year'", "twice"]),
        (["report", "--value", f"year={'1' * 8001}"], ["'year'", "8001", "--json"]),
        (["report", "--value", "year=1\x1b[2J"], ["'year'", "\\x1b"]),
        (["report", *["--value=a=1"] * 101], ["--value", "100"]),
        (["report", "--value", "year=1800"], ["1800 is too early."]),
        (["report", "--value", "year=2000", "--user", ""], ["user=''"]),
        (["report", "--value", "year=2000", "--method", "PUT"], ["PUT", "POST"]),
        (["now"], ["GET, POST"]),
    ],
)  # fmt: skip
def test_a_start_with_bad_parameters_is_a_usage_error(
    run: Run, words: list[str], parts: list[str]
) -> None:
    refused(run("submit", *words), 2, *parts)
    assert run("list", "--json").stdout == ""


@pytest.mark.parametrize("body", ["", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100])
def test_a_body_that_is_not_json_is_a_usage_error(run: Run, body: str) -> None:
    refused(run("submit", "now", "--method", "POST", "--json", "-", input=body), 2, "--json")


def test_a_body_over_the_limit_is_a_usage_error(
    make_app: Callable[..., Flask],
) -> None:
    app = make_app(ASYNCROUTE_MAX_BODY=10)
    async_routes = AsyncRoute(app)
    app.post("/work", endpoint="work")(async_routes.task(lambda: None))
    result = app.test_cli_runner().invoke(
        args=["asyncroute", "submit", "work", "--json", "-"], input='"0123456789"'
    )
    refused(result, 2, "10 bytes", "ASYNCROUTE_MAX_BODY")


def test_a_route_with_an_executor_of_the_app_cannot_be_submitted(
    make_app: Callable[..., Flask],
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    app = make_app()
    async_routes = AsyncRoute(app)
    with ThreadPoolExecutor(1) as executor:
        decorate = async_routes.task(executor=executor)
        app.post("/work", endpoint="work")(decorate(lambda: None))
        result = app.test_cli_runner().invoke(args=["asyncroute", "submit", "work"])
    refused(result, 2, "'work'", 'executor="thread"')


def test_filters_are_those_of_the_simple_query_style(run: Run) -> None:
    done, failed = finished(run), finished(run, error="a, b=c")
    assert [task["Id"] for task in lines(run("list", "--json"))] == [failed, done]
    both = run("list", "state=Failed,Method=POST", "--json")
    assert [task["Id"] for task in lines(both)] == [failed]
    one = run("list", "Error=ValueError: a, b%3Dc", "--json")
    assert [task["Id"] for task in lines(one)] == [failed]
    deep = run("list", "filter[CreationTime][GT]=2020-01-01T00:00:00+00:00", "--json")
    assert len(lines(deep)) == 2


def test_the_order_and_the_number_of_listed_tasks(run: Run) -> None:
    ids = [finished(run) for _ in range(3)]
    oldest_first = run("list", "--sort", "CreationTime", "--limit", "2", "--json")
    assert [task["Id"] for task in lines(oldest_first)] == ids[:2]
    assert len(lines(run("list", "--all", "--json"))) == 3


def test_all_pages_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flask_asyncroute.cli.reading.PAGE", 2)
    ids = [finished(run) for _ in range(5)]
    assert [task["Id"] for task in lines(run("list", "--all", "--json"))] == ids[::-1]
    assert [task["Id"] for task in lines(run("list", "--limit", "3", "--json"))] == ids[:1:-1]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["Bogus=1"], ["'Bogus'", "AsyncRouteId"]),
        (["Failed"], ["'Failed'", "FIELD=VALUE"]),
        (["State=Bogus"], ["State", "'Bogus'"]),
        (["State=Failed", "State=Running"], ["'State'", "twice"]),
        (["limit=3"], ["limit", "--limit"]),
        (["--sort", "Bogus"], ["'Bogus'", "CreationTime"]),
        (["Error=\udcff"], ["UTF-8"]),
        (["\x1b[2J=1"], ["\\x1b"]),
        (["Error=" + "x" * 1000], ["Error", "256"]),
    ],
)
def test_a_bad_filter_is_a_usage_error(run: Run, words: list[str], parts: list[str]) -> None:
    refused(run("list", *words), 2, *parts)


def test_an_empty_list_says_so(run: Run) -> None:
    result = run("list")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "There are no tasks.\n")
    assert run("list", "State=Failed").stderr == "No task matches.\n"
    assert run("list", "--json").output == ""


@pytest.mark.parametrize("command", ["show", "watch", "stop", "purge", "redeliver"])
@pytest.mark.parametrize("task_id", [UNKNOWN, "..", "a/b", "\x1b[2J", "x" * 5000])
def test_an_unknown_id_has_the_exit_code_3(run: Run, command: str, task_id: str) -> None:
    result = run(command, task_id)
    assert result.exit_code == 3
    error = result.stderr.splitlines()[0]
    assert error.startswith("Error: There is no task ") and len(error) < 600
    assert "namespace app" in error and not UNSAFE.search(error)


def test_a_task_that_has_ended_can_be_watched(run: Run) -> None:
    assert run("watch", finished(run)).exit_code == 0
    assert run("watch", finished(run), "--json").exit_code == 0
    task_id = finished(run, error="no")
    refused(run("watch", task_id), 1, task_id, "Failed", "ValueError: no")
    result = run("watch", task_id, "--json")
    assert result.exit_code == 1 and lines(result)[-1]["Error"] == "ValueError: no"


@pytest.fixture
def at_wait(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return ``at_wait(*functions)``: each wait for a task first calls the next function."""

    def prepare(*functions: Callable[[], Any]) -> None:
        left, wait = list(functions), Notifier.wait

        def first_call(self: Notifier, *words: Any) -> Any:
            if left:
                left.pop(0)()
            return wait(self, *words)

        monkeypatch.setattr(Notifier, "wait", first_call)
        monkeypatch.setattr(watching, "RETRY_SECONDS", 0.01)

    return prepare


def be_unavailable() -> None:
    raise StoreUnavailable("The store is down.")


def test_watch_survives_a_short_outage_of_the_store(
    app: Flask, run: Run, at_wait: Callable[..., None]
) -> None:
    task_id = submit(run, "report", "--value", "year=2026")

    def stop() -> None:
        runner = runtime_of(app).runner
        task = runner.store.get(task_id)
        assert task is not None
        runner.dispatcher.stop(task)

    at_wait(be_unavailable, be_unavailable, stop)
    result = run("watch", task_id)
    assert result.exit_code == 1 and "Aborted by the user" in result.stderr


def test_watch_ends_if_the_store_stays_unavailable(
    run: Run, at_wait: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = submit(run, "report", "--value", "year=2026")
    monkeypatch.setattr(watching, "OUTAGE_SECONDS", 0.02)
    at_wait(*[be_unavailable] * 100)
    refused(run("watch", task_id), 1, "asyncroute.db", "ASYNCROUTE_STORE")


def test_watch_ends_if_the_store_becomes_unavailable_while_it_waits(
    app: Flask, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = submit(run, "report", "--value", "year=2026")
    monkeypatch.setattr(watching, "CHECK_SECONDS", 0.02)
    monkeypatch.setattr(watching, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(watching, "OUTAGE_SECONDS", 0.02)
    wait = Waiter.wait

    def break_store(self: Waiter, seconds: float) -> bool:
        monkeypatch.setattr(runtime_of(app).runner.store, "get", lambda id: be_unavailable())
        return wait(self, seconds)

    monkeypatch.setattr(Waiter, "wait", break_store)
    refused(run("watch", task_id), 1, "asyncroute.db", "ASYNCROUTE_STORE")


def test_watch_of_a_task_that_is_removed_has_the_exit_code_3(
    app: Flask, run: Run, at_wait: Callable[..., None]
) -> None:
    task_id = submit(run, "report", "--value", "year=2026")
    expect = Expect((State.NOT_STARTED,))
    at_wait(lambda: runtime_of(app).runner.store.delete(task_id, expect))
    refused(run("watch", task_id), 3, task_id)


def test_several_tasks_are_stopped_and_the_exit_code_reports_errors(run: Run) -> None:
    one, two = (submit(run, "report", "--value", "year=2026") for _ in range(2))
    fixed, done = submit(run, "fixed"), finished(run)
    result = run("stop", one, fixed, done, two)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [f"Task {one} is Aborted.", f"Task {two} is Aborted."]
    assert len(result.stderr.splitlines()) == 2
    assert run("stop", one).exit_code == 0
    assert run("stop", UNKNOWN, done).exit_code == 3


def test_one_task_is_purged_without_a_question(run: Run) -> None:
    task_id = finished(run)
    assert run("purge", task_id).stdout == "Removed 1 of 1 tasks.\n"
    assert run("show", task_id).exit_code == 3


def test_a_question_precedes_the_removal_of_several_tasks(run: Run) -> None:
    ids = [finished(run, error="no") for _ in range(3)]
    kept = finished(run)
    waiting = submit(run, "report", "--value", "year=2026")
    refusal = run("purge", "State=Failed", input="n\n")
    assert refusal.exit_code == 1 and "Remove 3 tasks?" in refusal.stderr
    assert run("purge", *ids).exit_code == 1  # stdin is empty
    assert len(lines(run("list", "--json"))) == 5
    assert run("purge", "State=Failed", input="y\n").stdout == "Removed 3 of 3 tasks.\n"
    assert {task["Id"] for task in lines(run("list", "--json"))} == {kept, waiting}
    # Filters select only finished tasks.
    assert run("purge", "Method=POST", "--yes").stdout == "Removed 1 of 1 tasks.\n"
    assert run("purge", "State=Failed").stderr == "No task matches.\n"
    refused(run("purge", waiting), 1, "stop it first")


def test_ids_and_filters_cannot_be_mixed(run: Run) -> None:
    refused(run("purge", UNKNOWN, "State=Failed"), 2, "ids or filters")


def test_a_callback_is_sent_again(run: Run) -> None:
    task_id = submit(run, "hook")
    result = run("redeliver", task_id)
    assert (result.exit_code, result.stdout) == (
        0,
        f"The callback of task {task_id} will be sent again.\n",
    )
    refused(run("redeliver", finished(run)), 1, "no callback")


def test_tables_are_created_even_if_the_app_may_not(make_app: Callable[..., Flask]) -> None:
    app = make_app(ASYNCROUTE_CREATE_TABLES=False)
    AsyncRoute(app)
    runner = app.test_cli_runner()
    refused(runner.invoke(args=["asyncroute", "list"]), 2, "init-db", "ASYNCROUTE_CREATE_TABLES")
    for _ in range(2):
        result = runner.invoke(args=["asyncroute", "init-db"])
        assert result.exit_code == 0 and "asyncroute.db" in result.stdout
    assert runner.invoke(args=["asyncroute", "list"]).exit_code == 0


@pytest.mark.parametrize(
    "words", [["list"], ["show", "x"], ["workers"], ["submit", "x"], ["init-db"]]
)
def test_tasks_in_memory_cannot_be_seen(make_app: Callable[..., Flask], words: list[str]) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    AsyncRoute(app)
    refused(app.test_cli_runner().invoke(args=["asyncroute", *words]), 2, "memory://")


def test_routes_of_an_app_in_memory_are_listed(make_app: Callable[..., Flask]) -> None:
    app = make_app(ASYNCROUTE_STORE="memory://")
    AsyncRoute(app)
    assert app.test_cli_runner().invoke(args=["asyncroute", "routes"]).exit_code == 0


@pytest.mark.parametrize(
    ("store", "part"),
    [
        ("postgresql+psycopg://ann:secret@127.0.0.1:1/db", "127.0.0.1"),
        ("sqlite:////proc/none/asyncroute.db", "/proc/none/asyncroute.db"),
    ],
)
def test_an_unreachable_store_is_one_line(
    make_app: Callable[..., Flask], store: str, part: str
) -> None:
    app = make_app(ASYNCROUTE_STORE=store)
    AsyncRoute(app)
    for words in (["list"], ["init-db"]):
        result = app.test_cli_runner().invoke(args=["asyncroute", *words])
        refused(result, 1, part, "ASYNCROUTE_STORE")
        assert "secret" not in result.stderr


def test_a_misconfigured_app_is_a_usage_error(app: Flask, run: Run) -> None:
    app.config["ASYNCROUTE_DRIAN"] = 3
    refused(run("list"), 2, "ASYNCROUTE_DRIAN")


def test_a_command_closes_the_store(app: Flask, run: Run) -> None:
    assert run("list").exit_code == 0
    assert not runtime_of(app).has_runner


def test_a_command_leaves_the_runner_of_a_serving_process(app: Flask, run: Run) -> None:
    app.test_client().get("/task/none")
    runner = runtime_of(app).runner
    assert run("list").exit_code == 0
    assert runtime_of(app).runner is runner
    assert runner.dispatcher.is_runner


@pytest.mark.covers("A91")
def test_control_characters_are_escaped(run: Run) -> None:
    task_id = finished(run, error=ESCAPES)
    done = finished(run, message=ESCAPES, result={ESCAPES: ESCAPES})
    results = [
        run("list"), run("list", "--json"), run("show", task_id), run("show", done),
        run("show", done, "--json"), run("watch", task_id), run("watch", done),
        run("submit", ESCAPES), run("list", f"{ESCAPES}=1"), run("show", ESCAPES),
    ]  # fmt: skip
    for result in results:
        assert not UNSAFE.search(result.output), result.output
        assert "\\x1b[31mred" in result.output or "\\u001b[31mred" in result.output
    assert lines(results[4])[0]["Result"] == {ESCAPES: ESCAPES}
    # Each task is one line of the table.
    assert len(results[0].stdout.splitlines()) == 3


@pytest.mark.covers("A91")
def test_a_large_result_is_cut_except_in_json(make_app: Callable[..., Flask]) -> None:
    app = make_app(ASYNCROUTE_MAX_RESULT=20_000_000)
    async_routes = AsyncRoute(app)

    @app.post("/work")
    @async_routes.task(executor="immediate")
    def work() -> str:
        return "ü" * 5_000_000

    runner = app.test_cli_runner()
    result = runner.invoke(args=["asyncroute", "submit", "work", "--wait"])
    task_id = result.stdout.split()[0]
    assert len(result.stdout) < 3000 and "10,000,002 bytes" in result.stdout
    result = runner.invoke(args=["asyncroute", "show", task_id])
    assert len(result.stdout) < 4000 and "10,000,002 bytes" in result.stdout
    assert len(runner.invoke(args=["asyncroute", "list"]).stdout) < 1000
    result = runner.invoke(args=["asyncroute", "show", task_id, "--json"])
    assert json.loads(result.stdout)["Result"] == "ü" * 5_000_000


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain ü 東京 \\ [red]", "plain ü 東京 \\ [red]"),
        ("a\nb\t\x1b\x7f", "a\\nb\\t\\x1b\\x7f"),
        ("\x9b\x85", "\\x9b\\x85"),
        ("\u202e\u2066\u200f\u2029", "\\u202e\\u2066\\u200f\\u2029"),
        ("\ud800", "\\ud800"),
    ],
)
def test_escape(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@pytest.mark.parametrize(
    ("width", "columns"),
    [(200, [0, 2, 3]), (36 + 2 + 12 + 2 + 7, [0, 2, 3]), (55, [0, 2]), (40, [0]), (1, [0])],
)
def test_a_narrow_terminal_shows_the_first_columns(width: int, columns: list[int]) -> None:
    rows = [[UNKNOWN, "", "x" * 100, "Running"], [UNKNOWN, "", "", "Failed"]]
    found = _fitting(("Id", "Empty", "Route", "State"), rows, ("Id", "State"), width)
    assert list(found) == columns


@pytest.mark.parametrize("length", [1, 99, 100, 101, 1000])
@pytest.mark.parametrize("character", ["x", "ü", "😀"])
def test_a_preview_shows_the_size_of_a_longer_value(length: int, character: str) -> None:
    value = (length * character).encode()
    if length <= 100:
        assert preview(value, 100) == length * character
    else:
        start = 99 * character
        assert preview(value, 100) == f"{start}… ({len(value):,} bytes; use 'show --json')"


def test_long_cells_are_cut(run: Run) -> None:
    finished(run, error="x" * 1000)
    assert max(map(len, run("list").stdout.splitlines())) < 250


def test_workers_are_listed(app: Flask, run: Run) -> None:
    assert run("workers").stderr == "No process runs tasks of this app at the moment.\n"
    app.test_client().get("/task/none")
    runtime_of(app).runner.enter()
    (worker,) = lines(run("workers", "--json"))
    assert worker["Name"] == runtime_of(app).runner.lifecycle.owner
    assert worker["IsRunning"] is (True if sys.platform == "linux" else None)
    assert worker["Endpoints"] == ["fixed", "hook", "now", "report"] and worker["Tasks"] == 0
    assert worker["Name"] in run("workers").stdout


def completions(app: Flask, *words: str) -> list[str]:
    """Return the completions of the last word."""
    root = FlaskGroup(create_app=lambda: app)
    complete = ShellComplete(root, {"obj": ScriptInfo(create_app=lambda: app)}, "flask", "_X")
    with mock.patch.dict(os.environ):  # Flask sets FLASK_RUN_FROM_CLI
        found = complete.get_completions(["asyncroute", *words[:-1]], words[-1])
    return [item.value for item in found]


def test_the_shell_completes_commands_endpoints_and_states(app: Flask) -> None:
    assert completions(app, "re") == ["redeliver"]
    assert completions(app, "submit", "r") == ["report"]
    assert completions(app, "list", "comp") == ["CompletedTime="]
    assert completions(app, "list", "State=A") == ["State=Aborted"]
    # bash splits a word at "=".
    assert completions(app, "list", "Method=PUT", "State", "=", "A") == ["Aborted"]
    assert completions(app, "list", "State", "=") == list(State)
    assert completions(app, "list", "Method", "=", "PUT", "St") == ["State=", "StartingTime="]
    assert completions(app, "purge", "Cancellable=") == ["Cancellable=true", "Cancellable=false"]


@pytest.mark.parametrize("name", sorted(group.commands))
def test_the_help_of_each_command_has_an_example(run: Run, name: str) -> None:
    help = run(name, "--help").stdout
    assert re.search(rf"Examples?:\n  .*flask .*asyncroute {name}", help)
    assert max(map(len, help.splitlines())) <= 90


def test_an_app_without_async_routes(make_app: Callable[..., Flask]) -> None:
    app = make_app()
    AsyncRoute(app)
    assert app.test_cli_runner().invoke(args=["asyncroute", "routes"]).stderr == (
        "The app has no async routes.\n"
    )
